"""Documents from local files: plain text, JSON lines and Parquet.

A plain text file is one document; each line of a `.jsonl` file and each row of a `.parquet` file is one. A
JSON line or Parquet row holds either a text column, or a `prompt` and a `completion`; a prompt is read by the
model but never trained on.
"""

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

logger = logging.getLogger("jaxstream")

TEXT_SUFFIXES = (
    ".txt",
    ".md",
    ".rst",
    ".py",
    ".pyi",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".rs",
    ".go",
    ".js",
    ".ts",
    ".tex",
)
TABLE_SUFFIXES = (".jsonl", ".parquet")
MAX_NAMED = 20  # problems listed in one error; a directory of binaries must not fill the terminal


@dataclasses.dataclass(frozen=True)
class Document:
    """One text; the split and the packing treat it as a unit.

    Attributes:
        name: unique and stable, since the split into training and validation hashes it.
        text: what the model learns to write.
        prompt: text before `text` that the model only reads.
    """

    name: str
    text: str
    prompt: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
    """One file: `name` is its path relative to what the user gave, with forward slashes."""

    path: Path
    name: str

    @property
    def kind(self) -> str:
        """`text`, `jsonl` or `parquet`, by suffix."""
        return self.path.suffix[1:] if self.path.suffix in TABLE_SUFFIXES else "text"


def find_sources(paths: Sequence[str | Path], suffixes: Sequence[str] = TEXT_SUFFIXES + TABLE_SUFFIXES) -> list[Source]:
    """Files to read, sorted by name; directories are searched recursively, hidden entries left out.

    Args:
        paths: files, read whatever their suffix, and directories, in which only `suffixes` are read.
        suffixes: endings that count as text in a directory.

    Raises:
        ValueError: a path does not exist, a directory holds no such file, or two files share a name.
    """
    if not paths:
        raise ValueError("data paths are empty; give at least one file or directory")
    found: dict[str, Source] = {}
    for given in map(Path, paths):
        if given.is_file():
            entries = [Source(given, given.name)]
        elif given.is_dir():
            entries = [
                Source(path, f"{given.resolve().name}/{path.relative_to(given).as_posix()}")
                for path in sorted(given.rglob("*"))
                if path.suffix in suffixes
                and path.is_file()
                and not any(part.startswith(".") for part in path.relative_to(given).parts)
            ]
            if not entries:
                raise ValueError(f"directory {given} has no text: no file ends in any of {list(suffixes)}")
        else:
            raise ValueError(f"data path {given} does not exist")
        for entry in entries:
            if entry.name in found and found[entry.name].path.resolve() != entry.path.resolve():
                raise ValueError(
                    f"two data files are both named {entry.name!r}: {found[entry.name].path}, {entry.path}"
                )
            found[entry.name] = entry
    return [found[name] for name in sorted(found)]


def read_documents(
    sources: Sequence[Source], *, text_column: str = "text", on_error: str = "raise"
) -> Iterator[Document]:
    """Documents of the sources in order; blank ones are left out.

    Args:
        sources: from `find_sources`.
        text_column: column of JSON lines and Parquet that holds the text.
        on_error: "raise" names every unreadable or malformed file in one error; "skip" logs a warning for
            each and goes on without what could not be read.

    Raises:
        ValueError: files that cannot be read (with "raise"), or no document at all.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip'; got {on_error!r}")
    problems: list[str] = []
    count = 0
    for source in sources:
        try:
            for document in _READERS[source.kind](source, text_column):
                if problems and on_error == "raise":
                    continue  # only looking for further problems: one error names them all
                if document.text.strip():
                    count += 1
                    yield document
        except (OSError, ValueError) as error:
            problems.append(f"{source.path}: {error}")
            if on_error == "skip":
                logger.warning("skipping %s", problems[-1])
    if problems and on_error == "raise":
        shown = "\n  ".join(problems[:MAX_NAMED])
        more = f"\n  and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
        raise ValueError(f"{len(problems)} data file(s) could not be read:\n  {shown}{more}")
    if not count:
        raise ValueError(f"no text in {len(sources)} data file(s), first {sources[0].path if sources else None}")


def _read_text(source: Source, text_column: str) -> Iterator[Document]:
    try:
        text = source.path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start}: {error.object[error.start]:#04x})") from None
    yield Document(source.name, text)


def _read_jsonl(source: Source, text_column: str) -> Iterator[Document]:
    with source.path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                raise ValueError(f"line {number} is not UTF-8") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON ({error.msg})") from None
            if not isinstance(record, dict):
                raise ValueError(f"line {number} is no JSON object but {type(record).__name__}")
            yield _from_record(record, f"{source.name}:{number}", text_column, f"line {number}")


def _read_parquet(source: Source, text_column: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(source.path)
        names = [name for name in (text_column, "prompt", "completion") if name in file.schema_arrow.names]
        if not names:
            raise ValueError(f"no column {text_column!r}; it has {file.schema_arrow.names}")
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=names):
            for record in batch.to_pylist():
                number += 1
                yield _from_record(record, f"{source.name}:{number}", text_column, f"row {number}")
    except pyarrow.ArrowException as error:
        raise ValueError(f"not readable as Parquet ({str(error).splitlines()[0]})") from None


def _from_record(record: dict, name: str, text_column: str, where: str) -> Document:
    if text_column in record:
        fields = {"text": record[text_column]}
    elif "completion" in record and "prompt" in record:
        fields = {"text": record["completion"], "prompt": record["prompt"]}
    else:
        raise ValueError(f"{where} has neither {text_column!r} nor 'prompt' and 'completion'; it has {[*record]}")
    for key, value in fields.items():
        if not isinstance(value, str):
            raise ValueError(f"{where}: {key} must be a string; got {type(value).__name__}")
    return Document(name, **fields)


_READERS = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}
