"""Reading local files: what is found, what is read, and how bad input is named."""

import json
import logging
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from train.data.sources import find_sources, read_documents


def test_finds_text_in_order_and_leaves_out_hidden_and_other_files(tmp_path: Path):
    for name in ("b.py", "a/c.txt", ".hidden/x.txt", "picture.png", ".secret.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    names = [source.name for source in find_sources([tmp_path])]
    assert names == [f"{tmp_path.name}/a/c.txt", f"{tmp_path.name}/b.py"]
    # a file given by itself is read whatever its suffix
    assert [source.kind for source in find_sources([tmp_path / "picture.png"])] == ["text"]


def test_reads_text_jsonl_and_parquet(tmp_path: Path):
    (tmp_path / "a.txt").write_text("plain äöü")
    lines = [{"text": "one"}, {"prompt": "two?", "completion": "two!"}, {"text": "  "}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["three", "four"], "n": [1, 2]}), tmp_path / "c.parquet")
    documents = list(read_documents(find_sources([tmp_path])))
    assert [document.text for document in documents] == ["plain äöü", "one", "two!", "three", "four"]
    assert [document.prompt for document in documents] == ["", "", "two?", "", ""]
    assert len({document.name for document in documents}) == 5


@pytest.mark.parametrize("paths", [[], ["nothing-here"]])
def test_missing_paths_are_named(paths):
    with pytest.raises(ValueError, match=paths[0] if paths else "empty"):
        find_sources(paths)


def test_directory_without_text_and_blank_text_are_refused(tmp_path: Path):
    (tmp_path / "x.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match=f"{tmp_path.name} has no text"):
        find_sources([tmp_path])
    (tmp_path / "x.txt").write_text(" \n")
    with pytest.raises(ValueError, match="no text in 1 data file"):
        list(read_documents(find_sources([tmp_path])))


def bad_corpus(root: Path) -> None:
    (root / "a.txt").write_text("good")
    (root / "latin.txt").write_bytes("ä".encode("latin-1"))
    (root / "lines.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (root / "number.jsonl").write_text('{"text": 3}\n')
    (root / "other.jsonl").write_text('{"body": "x"}\n')
    (root / "table.parquet").write_bytes(b"PAR1 no table at all")
    (root / "z.txt").write_text("also good")


def test_one_error_names_every_bad_file(tmp_path: Path):
    bad_corpus(tmp_path)
    with pytest.raises(ValueError) as caught:
        list(read_documents(find_sources([tmp_path])))
    message = str(caught.value)
    assert "5 data file(s)" in message
    for name, reason in (
        ("latin.txt", "not UTF-8 (byte 0: 0xe4)"),
        ("lines.jsonl", "line 2 is not JSON"),
        ("number.jsonl", "line 1: text must be a string; got int"),
        ("other.jsonl", "neither 'text' nor"),
        ("table.parquet", "not readable as Parquet"),
    ):
        assert any(name in line and reason in line for line in message.splitlines()), (name, message)


def test_skip_reads_the_rest_and_warns(tmp_path: Path, caplog):
    bad_corpus(tmp_path)
    with caplog.at_level(logging.WARNING, "jaxstream"):
        documents = list(read_documents(find_sources([tmp_path]), on_error="skip"))
    assert [document.text for document in documents] == ["good", "fine", "also good"]
    assert len(caplog.records) == 5


def test_unreadable_file_is_named(tmp_path: Path, monkeypatch):
    (tmp_path / "locked.txt").write_text("x")
    sources = find_sources([tmp_path])

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read everything, so permissions cannot test it
    with pytest.raises(ValueError, match=r"locked\.txt.*Permission denied"):
        list(read_documents(sources))
