"""The demonstration corpus as training data: how its file list is made, and its row store.

`python -m train.data.corpus` prints the list of the running interpreter; the committed one is that of the
Python release named in `jaxmodels/demo/corpus.py`.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import tokenizers

from jaxmodels.demo.corpus import Corpus, corpus_files, stdlib_directory
from train.data.rows import RowStore, StoreConfig, build_store, fingerprint_of, read_manifest
from train.data.sources import Document

# Tests; bundled wheels; files that the build of one machine generates; text and tables in the shape of code.
EXCLUDED_DIRECTORIES = (
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled", "pydoc_data",
    "__phello__",
)  # fmt: skip
EXCLUDED_PREFIXES = ("config-", "_sysconfigdata", "encodings/", "html/entities", "this.py", "turtledemo/")
VALIDATION_SHARE, TEST_SHARE = 0.05, 0.12


def make_file_list(directory: Path | None = None) -> str:
    """`SHA-256 split path` per line for the standard library in `directory` (the running interpreter's if
    None).

    The split is by file, chosen by a hash of its path: later releases keep every file in its split.
    """
    root = directory or stdlib_directory()
    lines = []
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if path.startswith(EXCLUDED_PREFIXES) or not set(EXCLUDED_DIRECTORIES).isdisjoint(path.split("/")[:-1]):
            continue
        content = file.read_bytes()
        if len(content) >= 200:
            lines.append(f"{hashlib.sha256(content).hexdigest()} {split_of(path)} {path}")
    return "\n".join(lines) + "\n"


def split_of(path: str) -> str:
    """`train`, `validation` or `test` by a hash of the path."""
    share = int.from_bytes(hashlib.sha256(f"jaxstream {path}".encode()).digest()[:8]) / 2**64
    return "test" if share < TEST_SHARE else "validation" if share < TEST_SHARE + VALIDATION_SHARE else "train"


def open_or_build_corpus(
    directory: Path,
    corpus: Corpus,
    tokenizer: tokenizers.Tokenizer,
    config: StoreConfig,
    *,
    rebuild: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Row store of the corpus with the splits train, validation and test.

    Args:
        directory: where it is or shall be.
        corpus: from `load_corpus`.
        tokenizer: see `build_store`.
        config: packing; `validation_fraction` has no part in it, the list decides.
        rebuild: replace a store of another corpus or configuration instead of refusing it.
        progress: see `build_store`.

    Raises:
        ValueError: a stale store and `rebuild` is False.
    """
    files = [
        (path, hashlib.sha256(text.encode()).hexdigest(), corpus.splits[path]) for path, text in corpus.texts.items()
    ]
    fingerprint = fingerprint_of(files, tokenizer, config, {"corpus": "stdlib"})
    if (directory / "manifest.json").is_file() and not rebuild:
        if read_manifest(directory)["fingerprint"] == fingerprint:
            RowStore(directory)
            return directory
        raise ValueError(f"row store {directory} is stale: corpus, tokeniser or settings changed; rebuild it")
    documents = (Document(path, text) for path, text in corpus.texts.items())
    build_store(
        directory,
        documents,
        tokenizer,
        config,
        fingerprint=fingerprint,
        split=corpus.splits.__getitem__,
        progress=progress,
    )
    return directory


def corpus_digest() -> str:
    """SHA-256 of the committed file list, recorded beside trained models."""
    lines = "\n".join(f"{file.sha256} {file.split} {file.path}" for file in corpus_files())
    return hashlib.sha256(lines.encode()).hexdigest()


if __name__ == "__main__":
    print(make_file_list(), end="")
