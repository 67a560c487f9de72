"""The file list of the demonstration corpus, and what happens under another Python."""

import hashlib
import logging
import platform
from pathlib import Path

import pytest

from jaxmodels.demo.corpus import PYTHON_VERSION, SPLITS, corpus_files, load_corpus
from train.data.corpus import make_file_list, open_or_build_corpus, split_of
from train.data.rows import RowStore, StoreConfig
from train.data.tokenizer import train_tokenizer


def test_list_is_complete_and_split_by_file():
    files = corpus_files()
    assert len(files) > 500 and len({file.path for file in files}) == len(files)
    assert all(file.split == split_of(file.path) for file in files)
    share = {split: sum(file.split == split for file in files) / len(files) for split in SPLITS}
    assert 0.75 < share["train"] < 0.9 and share["test"] > 0.08
    assert not [f.path for f in files if "test" in f.path.split("/")[:-1] or "idle_test" in f.path]


@pytest.mark.skipif(platform.python_version() != PYTHON_VERSION, reason=f"the list is that of Python {PYTHON_VERSION}")
def test_list_is_what_its_maker_gives():
    committed = "".join(f"{file.sha256} {file.split} {file.path}\n" for file in corpus_files())
    assert make_file_list() == committed


def fake_library(root: Path, count: int = 40) -> None:
    for file in corpus_files()[:count]:
        (root / file.path).parent.mkdir(parents=True, exist_ok=True)
        (root / file.path).write_text(f"# {file.path}\n" * 30)


def test_another_python_is_a_warning(tmp_path: Path, caplog):
    fake_library(tmp_path)
    with caplog.at_level(logging.WARNING, "jaxstream"):
        corpus = load_corpus(tmp_path)
    assert len(corpus.changed) == 40 and len(corpus.missing) == len(corpus_files()) - 40
    assert len(caplog.records) == 1 and f"not Python {PYTHON_VERSION}'s" in caplog.text and "40 differ" in caplog.text
    assert sum(len(corpus.split(split)) for split in SPLITS) == 40
    with pytest.raises(ValueError, match="split must be one of"):
        corpus.split("dev")


def test_no_library_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="holds none of the"):
        load_corpus(tmp_path)


def test_store_follows_the_list_and_notices_changes(tmp_path: Path, caplog):
    fake_library(tmp_path / "lib")
    tokenizer = train_tokenizer(["# some text\n" * 4], 262)
    config = StoreConfig(seq_len=64, eos_id=0)
    corpus = load_corpus(tmp_path / "lib")
    directory = open_or_build_corpus(tmp_path / "store", corpus, tokenizer, config)
    for split in SPLITS:
        if corpus.split(split):
            assert RowStore(directory, split).num_documents == len(corpus.split(split))
    assert open_or_build_corpus(directory, corpus, tokenizer, config) == directory
    first = next(iter(corpus.texts))
    (tmp_path / "lib" / first).write_text("# changed\n" * 30)
    with pytest.raises(ValueError, match="stale"):
        open_or_build_corpus(directory, load_corpus(tmp_path / "lib"), tokenizer, config)


def test_texts_are_those_of_the_hashes():
    if load_corpus().changed:
        pytest.skip("another Python release")
    corpus = load_corpus()
    file = corpus_files()[0]
    assert hashlib.sha256(corpus.texts[file.path].encode()).hexdigest() == file.sha256
