"""Documents packed offline into an indexed store of fixed-length rows.

A store is a directory:

    manifest.json                   written last: configuration, fingerprint, sizes and SHA-256 of every file
    tokenizer.json                  the tokeniser that made the tokens
    train/tokens.bin                all documents one after the other, each followed by EOS; uint16 or uint32
    train/pieces.bin                int64 [P, 5]: row, column, length, offset into tokens.bin, unsupervised
    validation/...                  the same

Packing is sequential: documents fill rows one after the other and continue in the next row. Each piece of a
row is one segment (1, 2, ...; 0 is padding) with positions from 0, so no attention crosses documents. Rows
are views: `cuts` of them with different offsets cover the same tokens several times without storing these
again. With `align > 1` each document starts at a multiple of it, so blocks of a block-diffusion model never
span documents.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from train.data.sources import Document, Source, find_sources, read_documents

if TYPE_CHECKING:  # rows are read without it
    import tokenizers

logger = logging.getLogger("jaxstream")

FORMAT = 1
TRAIN, VALIDATION = "train", "validation"
DOCUMENTS_PER_ENCODE = 256


@dataclasses.dataclass(frozen=True)
class StoreConfig:
    """What decides the content of a store, beside documents and tokeniser.

    Attributes:
        seq_len: tokens per row.
        eos_id: appended to every document.
        align: documents start at multiples of this column.
        cuts: how many times the training tokens are cut into rows, each time at another offset.
        validation_fraction: share of documents kept for validation, chosen by a hash of their names.
        split_seed: another seed chooses other documents.
    """

    seq_len: int
    eos_id: int
    align: int = 1
    cuts: int = 1
    validation_fraction: float = 0.01
    split_seed: int = 0

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise ValueError(f"seq_len must be at least 2; got {self.seq_len}")
        if self.eos_id < 0:
            raise ValueError(f"eos_id must be a token id; got {self.eos_id}")
        if self.align < 1 or self.seq_len % self.align:
            raise ValueError(f"align must divide seq_len = {self.seq_len}; got {self.align}")
        if not 1 <= self.cuts <= self.seq_len:
            raise ValueError(f"cuts must lie in 1..seq_len = {self.seq_len}; got {self.cuts}")
        if not 0.0 <= self.validation_fraction < 1.0:
            raise ValueError(f"validation_fraction must lie in [0, 1); got {self.validation_fraction}")

    def split(self, name: str) -> str:
        """`train` or `validation` for a document of this name."""
        digest = hashlib.sha256(f"{self.split_seed}:{name}".encode()).digest()
        return VALIDATION if int.from_bytes(digest[:8]) < self.validation_fraction * 2**64 else TRAIN


class RowStore:
    """One split of a store: a random-access sequence of rows, read through a memory map.

    `store[i]` is a dict of NumPy arrays of length `seq_len`: `tokens` int32, `segment_ids` int32 (0 =
    padding), `positions` int32 (from 0 in every segment), `loss_mask` bool (token may be trained on: no
    padding, no prompt).
    """

    def __init__(self, directory: str | Path, split: str = TRAIN, *, verify: bool = False):
        """Opens a split.

        Args:
            directory: what `build_store` wrote.
            split: `train` or `validation`, or another name that the builder's split function returned.
            verify: also compare the files' SHA-256, which reads them whole.

        Raises:
            ValueError: no or an unfinished store, an unknown or empty split, or a file whose size or (with
                `verify`) content is not what the manifest says.
        """
        self.directory = Path(directory)
        self.split = split
        self.manifest = read_manifest(self.directory)
        if split not in self.manifest["splits"]:
            raise ValueError(f"row store {directory} has no split {split!r}; it has {[*self.manifest['splits']]}")
        info = self.manifest["splits"][split]
        for name, entry in info["files"].items():
            path = self.directory / split / name
            size = path.stat().st_size if path.is_file() else None
            if size != entry["bytes"]:
                state = (
                    "is missing"
                    if size is None
                    else f"has {size} bytes, not {entry['bytes']}: truncated or overwritten"
                )
                raise ValueError(f"row store file {path} {state}; rebuild the store")
            if verify and _sha256(path) != entry["sha256"]:
                raise ValueError(f"row store file {path} is corrupt: its SHA-256 differs; rebuild the store")
        if not info["rows"]:
            raise ValueError(f"split {split!r} of row store {directory} has no rows: too few documents for it")
        self.seq_len: int = self.manifest["config"]["seq_len"]
        self.num_tokens: int = info["tokens"]
        self.num_documents: int = info["documents"]
        self._rows: int = info["rows"]
        self._tokens = np.memmap(self.directory / split / "tokens.bin", dtype=self.manifest["dtype"], mode="r")
        self._pieces = np.fromfile(self.directory / split / "pieces.bin", dtype="<i8").reshape(-1, 5)
        self._start = np.searchsorted(self._pieces[:, 0], np.arange(self._rows + 1))

    @property
    def fingerprint(self) -> str:
        """Identifies data, tokeniser and configuration; a resumed run compares it."""
        return self.manifest["fingerprint"]

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < self._rows:
            raise IndexError(f"row {index} of a store of {self._rows} rows")
        tokens = np.zeros(self.seq_len, np.int32)
        segment_ids = np.zeros(self.seq_len, np.int32)
        positions = np.zeros(self.seq_len, np.int32)
        loss_mask = np.zeros(self.seq_len, bool)
        rows = self._pieces[self._start[index] : self._start[index + 1]]
        for segment, (_, column, length, offset, unsupervised) in enumerate(rows, 1):
            here = slice(column, column + length)
            tokens[here] = self._tokens[offset : offset + length]
            segment_ids[here] = segment
            positions[here] = np.arange(length)
            loss_mask[column + unsupervised : column + length] = True
        return {"tokens": tokens, "segment_ids": segment_ids, "positions": positions, "loss_mask": loss_mask}

    def documents(self) -> Iterator[np.ndarray]:
        """The documents' token ids in the order of the store, without the end token that closes each."""
        eos_id = self.manifest["config"]["eos_id"]
        start = 0
        for end in np.flatnonzero(self._tokens == eos_id):
            yield np.asarray(self._tokens[start:end])
            start = int(end) + 1

    def __repr__(self) -> str:  # grain records it beside the iterator state
        return f"RowStore({self.fingerprint[:16]}, {self.split}, rows={self._rows})"


def read_manifest(directory: str | Path) -> dict:
    """The manifest of a finished store.

    Raises:
        ValueError: none there, unreadable, or of another format version.
    """
    path = Path(directory) / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{directory} is no finished row store: it has no manifest.json")
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); rebuild the store") from None
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} has format {manifest.get('format')}; this version reads format {FORMAT}")
    return manifest


def build_store(
    directory: str | Path,
    documents: Iterable[Document],
    tokenizer: "tokenizers.Tokenizer",
    config: StoreConfig,
    *,
    fingerprint: str,
    split: Callable[[str], str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes a store in one step: under its name stands either all of it or what stood there before.

    Args:
        directory: new directory, or one that a store of ours occupies, which is then replaced.
        documents: each goes whole into one split.
        tokenizer: encodes without adding special tokens.
        config: packing.
        fingerprint: identity of the result, from `store_fingerprint`.
        split: document name -> split name; `config.split` if None.
        progress: called with (documents, tokens) so far.

    Raises:
        ValueError: the directory holds something else, EOS is not in the vocabulary, or no token came out.
        OSError: the disk is full or not writable; nothing already there is changed.
    """
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()) and not (directory / "manifest.json").is_file():
        raise ValueError(f"{directory} exists and is no row store; give another directory")
    vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
    if config.eos_id >= vocab_size:
        raise ValueError(f"eos_id must be below the vocabulary size {vocab_size}; got {config.eos_id}")
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    split = split or config.split

    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.parent / f".{directory.name}.building-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        lengths = _write_tokens(temporary, documents, tokenizer, config.eos_id, dtype, split, progress)
        if not any(lengths.values()):
            raise ValueError("no text: no document gave a token")
        splits = {}
        for name in sorted({TRAIN, VALIDATION, *lengths}):
            (temporary / name).mkdir(exist_ok=True)
            (temporary / name / "tokens.bin").touch()
            table = np.asarray(lengths.get(name, []), np.int64).reshape(-1, 2)
            pieces, rows = cut_rows(table, config.seq_len, align=config.align, cuts=config.cuts if name == TRAIN else 1)
            _write_bytes(temporary / name / "pieces.bin", np.ascontiguousarray(pieces, "<i8").tobytes())
            files = {
                file: {
                    "bytes": (temporary / name / file).stat().st_size,
                    "sha256": _sha256(temporary / name / file),
                }
                for file in ("tokens.bin", "pieces.bin")
            }
            splits[name] = {
                "rows": rows, "tokens": int(table[:, 0].sum()), "documents": len(table), "files": files,
            }  # fmt: skip
        _write_bytes(temporary / "tokenizer.json", tokenizer.to_str().encode())
        manifest = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "config": dataclasses.asdict(config),
            "vocab_size": vocab_size,
            "dtype": dtype.str,
            "splits": splits,
        }
        _write_bytes(temporary / "manifest.json", json.dumps(manifest, indent=1).encode())
        _replace_directory(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def open_or_build(
    directory: str | Path,
    paths: Sequence[str | Path],
    tokenizer: "tokenizers.Tokenizer",
    config: StoreConfig,
    *,
    text_column: str = "text",
    on_error: str = "raise",
    rebuild: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Makes sure that `directory` holds the store of these files, tokeniser and configuration.

    Args:
        directory: where the store is or shall be.
        paths: files and directories of text, see `find_sources`.
        tokenizer: encodes; part of the fingerprint.
        config: packing; part of the fingerprint.
        text_column: see `read_documents`.
        on_error: see `read_documents`.
        rebuild: replace a store that was made from other data or with other settings, instead of refusing it.
        progress: see `build_store`.

    Returns:
        The directory, for `RowStore`.

    Raises:
        ValueError: bad data (see `read_documents`), or a stale store and `rebuild` is False.
    """
    directory = Path(directory)
    sources = find_sources(paths)
    settings = {"text_column": text_column, "on_error": on_error}
    fingerprint = store_fingerprint(sources, tokenizer, config, settings)
    if (directory / "manifest.json").is_file():
        stored = None
        try:
            manifest = read_manifest(directory)
            stored = manifest["fingerprint"]
        except ValueError:
            if not rebuild:
                raise
        if stored == fingerprint:
            for name, info in manifest["splits"].items():
                if info["rows"]:
                    RowStore(directory, name)  # its size checks
            return directory
        if not rebuild:
            changed = _differences(manifest["config"], dataclasses.asdict(config))
            raise ValueError(
                f"row store {directory} is stale: {changed or 'its data files or tokeniser changed'}; "
                "rebuild it, or give another directory"
            )
    documents = read_documents(sources, text_column=text_column, on_error=on_error)
    build_store(directory, documents, tokenizer, config, fingerprint=fingerprint, progress=progress)
    return directory


def store_fingerprint(
    sources: Iterable[Source], tokenizer: "tokenizers.Tokenizer", config: StoreConfig, settings: dict
) -> str:
    """SHA-256 over all that decides a store: names, sizes and times of the files, tokeniser,
    configuration."""
    files = []
    for source in sources:
        stat = source.path.stat()
        files.append((source.name, stat.st_size, stat.st_mtime_ns))
    return fingerprint_of(files, tokenizer, config, settings)


def fingerprint_of(files: list, tokenizer: "tokenizers.Tokenizer", config: StoreConfig, settings: dict) -> str:
    """SHA-256 over a JSON-able description of the documents, the tokeniser and the configuration."""
    content = {
        "format": FORMAT,
        "files": files,
        "tokenizer": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        "config": dataclasses.asdict(config),
        "settings": settings,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def cut_rows(table: np.ndarray, seq_len: int, *, align: int = 1, cuts: int = 1) -> tuple[np.ndarray, int]:
    """Rows over documents that lie one after the other.

    Args:
        table: int64 [documents, 2]: length in tokens, and how many leading ones are a prompt.
        seq_len: tokens per row.
        align: documents start at multiples of this column.
        cuts: number of passes; pass c ends its first row after about (cuts - c)/cuts of a row, so that every
            pass cuts documents elsewhere.

    Returns:
        pieces int64 [P, 5] (row, column, length, offset, unsupervised) sorted by row, and the number of rows.
    """
    pieces: list[tuple[int, int, int, int, int]] = []
    row = 0
    for cut in range(cuts):
        column = seq_len * cut // cuts // align * align
        offset = 0
        for length, prompt in table.tolist():
            done = 0
            while done < length:
                if column >= seq_len:
                    row, column = row + 1, 0
                take = min(length - done, seq_len - column)
                pieces.append((row, column, take, offset + done, min(max(prompt - done, 0), take)))
                column += take
                done += take
            column = -(-column // align) * align
            offset += length
        row = pieces[-1][0] + 1 if pieces else 0
    return np.asarray(pieces, np.int64).reshape(-1, 5), row


def _write_tokens(
    root: Path,
    documents: Iterable[Document],
    tokenizer: "tokenizers.Tokenizer",
    eos_id: int,
    dtype: np.dtype,
    split: Callable[[str], str],
    progress: Callable[[int, int], None] | None,
) -> dict[str, list[tuple[int, int]]]:
    """Encodes all documents; returns split -> [(length with EOS, prompt tokens)]."""
    lengths: dict[str, list[tuple[int, int]]] = {}
    files = {}
    encode = functools.partial(tokenizer.encode_batch_fast, add_special_tokens=False)
    total = count = 0

    def flush(batch: list[Document]) -> None:
        nonlocal total, count
        # A prompt is encoded by itself: at generation, too, no token spans the end of the prompt.
        texts = encode([document.text for document in batch])
        prompts = encode([document.prompt for document in batch])
        for document, text, prompt in zip(batch, texts, prompts, strict=True):
            ids = [*prompt.ids, *text.ids, eos_id]
            name = split(document.name)
            if name not in files:
                (root / name).mkdir()
                files[name] = (root / name / "tokens.bin").open("wb")
                lengths[name] = []
            files[name].write(np.asarray(ids, dtype).tobytes())
            lengths[name].append((len(ids), len(prompt.ids)))
            total += len(ids)
        count += len(batch)
        if progress:
            progress(count, total)

    batch: list[Document] = []
    try:
        for document in documents:
            batch.append(document)
            if len(batch) == DOCUMENTS_PER_ENCODE:
                flush(batch)
                batch = []
        if batch:
            flush(batch)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in files.values():
            file.close()
    return lengths


def _differences(old: dict, new: dict) -> str:
    return ", ".join(f"{key} was {old.get(key)}, is {new[key]}" for key in new if old.get(key) != new[key])


def _write_bytes(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _replace_directory(temporary: Path, directory: Path) -> None:
    old = directory.parent / f".{directory.name}.old-{os.getpid()}"
    if directory.exists():
        directory.rename(old)
    try:
        temporary.rename(directory)
    except OSError:
        if old.exists():
            old.rename(directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
