"""The corpus of the shipped models: the standard library's own sources, as the running interpreter has them.

`stdlib-3.12.1.sha256` lists every file with its SHA-256 under Python 3.12.1 and its split (train, validation,
test). No text is copied into this project: the files are read from the interpreter that runs. Another Python
release changes some files; that is a warning which says how many, since training then is no exact repetition.
"""

import dataclasses
import functools
import hashlib
import logging
import sysconfig
from pathlib import Path

logger = logging.getLogger("jaxstream")

PYTHON_VERSION = "3.12.1"
FILE_LIST = Path(__file__).with_name(f"stdlib-{PYTHON_VERSION}.sha256")
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class CorpusFile:
    """One listed file: path below the standard library's directory, SHA-256 under `PYTHON_VERSION`, split."""

    path: str
    sha256: str
    split: str


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Texts by path in list order, and how the running interpreter's files differ from the list."""

    texts: dict[str, str]
    splits: dict[str, str]
    changed: tuple[str, ...]
    missing: tuple[str, ...]

    def split(self, name: str) -> dict[str, str]:
        """path -> text of one split."""
        if name not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}; got {name!r}")
        return {path: text for path, text in self.texts.items() if self.splits[path] == name}


@functools.cache
def corpus_files() -> tuple[CorpusFile, ...]:
    """The list, in its order."""
    files = []
    for line in FILE_LIST.read_text("utf-8").splitlines():
        sha256, split, path = line.split(" ", 2)
        files.append(CorpusFile(path, sha256, split))
    return tuple(files)


def stdlib_directory() -> Path:
    """Where the running interpreter keeps its standard library."""
    return Path(sysconfig.get_path("stdlib"))


def load_corpus(directory: str | Path | None = None) -> Corpus:
    """Reads the listed files, warns once where they are not those of the list.

    Args:
        directory: a standard library; the running interpreter's if None.

    Raises:
        ValueError: the directory holds none of the files, or a listed one is not UTF-8.
    """
    root = Path(directory) if directory is not None else stdlib_directory()
    texts, splits, changed, missing = {}, {}, [], []
    for file in corpus_files():
        try:
            content = (root / file.path).read_bytes()
        except FileNotFoundError:
            missing.append(file.path)
            continue
        if hashlib.sha256(content).hexdigest() != file.sha256:
            changed.append(file.path)
        try:
            texts[file.path] = content.decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{root / file.path} is not UTF-8 (byte {error.start})") from None
        splits[file.path] = file.split
    if not texts:
        raise ValueError(f"{root} holds none of the {len(missing)} standard library files of the corpus")
    if changed or missing:
        logger.warning(
            "the standard library in %s is not Python %s's: of %d files %d differ (first: %s), %d "
            "are missing (first: %s); results will differ from the recorded ones",
            root,
            PYTHON_VERSION,
            len(corpus_files()),
            len(changed),
            changed[0] if changed else "none",
            len(missing),
            missing[0] if missing else "none",
        )
    return Corpus(texts, splits, tuple(changed), tuple(missing))
