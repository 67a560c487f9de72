"""The row store: packing, splits, exactness, and refusal of what is stale or damaged."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

import train.data.rows as rows_module
from train.data.rows import RowStore, StoreConfig, build_store, cut_rows, open_or_build
from train.data.sources import Document
from train.data.tokenizer import special_ids, train_tokenizer

TOKENIZER = train_tokenizer(["def f(x):\n    return x\n"], 259)
EOS = special_ids(TOKENIZER)["eos"]


def documents(count: int, seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    return [
        Document(f"d{i}", "".join(rng.choice(list("abc \n"), rng.integers(1, 40))), "?" * int(rng.integers(0, 5)))
        for i in range(count)
    ]


def build(directory: Path, items, **options) -> Path:
    build_store(directory, items, TOKENIZER, StoreConfig(eos_id=EOS, **options), fingerprint="test")
    return directory


def segments(store: RowStore) -> list[list[int]]:
    out = []
    for i in range(len(store)):
        row = store[i]
        for segment in range(1, row["segment_ids"].max() + 1):
            here = row["segment_ids"] == segment
            assert (np.diff(np.flatnonzero(here)) == 1).all()
            assert (row["positions"][here] == np.arange(here.sum())).all()
            out.append(row["tokens"][here].tolist())
    return out


@pytest.mark.smoke
@pytest.mark.parametrize(("seq_len", "align", "cuts"), [(7, 1, 1), (16, 4, 1), (16, 4, 3), (64, 1, 2), (12, 12, 1)])
def test_rows_hold_every_token_once_per_cut(tmp_path: Path, seq_len, align, cuts):
    items = documents(50)
    directory = build(tmp_path / "s", items, seq_len=seq_len, align=align, cuts=cuts, validation_fraction=0.0)
    store = RowStore(directory, verify=True)
    expected = [[*TOKENIZER.encode(d.prompt).ids, *TOKENIZER.encode(d.text).ids, EOS] for d in items]
    flat = [token for document in expected for token in document]
    assert [token for piece in segments(store) for token in piece] == flat * cuts
    assert store.num_tokens == len(flat) and store.num_documents == 50
    supervised = 0
    for i in range(len(store)):
        row = store[i]
        assert {key: (value.shape, value.dtype.name) for key, value in row.items()} == {
            "tokens": ((seq_len,), "int32"),
            "segment_ids": ((seq_len,), "int32"),
            "positions": ((seq_len,), "int32"),
            "loss_mask": ((seq_len,), "bool"),
        }
        assert not row["loss_mask"][row["segment_ids"] == 0].any()
        starts = np.flatnonzero((row["positions"] == 0) & (row["segment_ids"] > 0))
        assert (starts % align == 0).all()
        supervised += row["loss_mask"].sum()
    assert supervised == cuts * sum(len(e) - len(d.prompt) for d, e in zip(items, expected))


def test_cuts_differ_and_no_piece_is_empty():
    table = np.array([[100, 0], [1, 0], [60, 5]])
    pieces, count = cut_rows(table, 32, cuts=4)
    assert pieces[:, 2].min() >= 1 and (pieces[:, 1] + pieces[:, 2]).max() <= 32
    assert pieces[:, 2].sum() == 4 * 161 and count == pieces[-1, 0] + 1
    first = [pieces[pieces[:, 0] == row][0, 1:4].tolist() for row in sorted(set(pieces[:, 0]))]
    assert len({offset for _, _, offset in first}) > 10  # other cut, other offsets


def test_split_is_by_document_and_stable(tmp_path: Path):
    items = documents(400)
    config = StoreConfig(seq_len=16, eos_id=EOS, validation_fraction=0.25)
    chosen = {d.name for d in items if config.split(d.name) == "validation"}
    assert 60 < len(chosen) < 140
    assert chosen == {d.name for d in reversed(items) if config.split(d.name) == "validation"}
    build_store(tmp_path / "s", items, TOKENIZER, config, fingerprint="x")
    assert RowStore(tmp_path / "s", "validation").num_documents == len(chosen)
    assert RowStore(tmp_path / "s", "train").num_documents == 400 - len(chosen)
    other = StoreConfig(seq_len=16, eos_id=EOS, validation_fraction=0.25, split_seed=1)
    assert chosen != {d.name for d in items if other.split(d.name) == "validation"}


def test_open_or_build_reuses_refuses_and_rebuilds(tmp_path: Path):
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("hello world " * 30)
    config = StoreConfig(seq_len=16, eos_id=EOS, validation_fraction=0.0)
    store = tmp_path / "store"
    open_or_build(store, [text], TOKENIZER, config)
    first = RowStore(store).fingerprint
    stamp = (store / "manifest.json").stat().st_mtime_ns
    open_or_build(store, [text], TOKENIZER, config)
    assert (store / "manifest.json").stat().st_mtime_ns == stamp  # not built again
    longer = StoreConfig(seq_len=32, eos_id=EOS, validation_fraction=0.0)
    with pytest.raises(ValueError, match="stale: seq_len was 16, is 32"):
        open_or_build(store, [text], TOKENIZER, longer)
    (text / "b.txt").write_text("more")
    with pytest.raises(ValueError, match="its data files or tokeniser changed"):
        open_or_build(store, [text], TOKENIZER, config)
    assert RowStore(store).fingerprint == first
    open_or_build(store, [text], TOKENIZER, config, rebuild=True)
    assert RowStore(store).fingerprint != first and RowStore(store).num_documents == 2


@pytest.mark.parametrize("file", ["train/tokens.bin", "train/pieces.bin"])
def test_damage_is_detected(tmp_path: Path, file):
    directory = build(tmp_path / "s", documents(20), seq_len=16, validation_fraction=0.0)
    path = directory / file
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    with pytest.raises(ValueError, match=rf"{file.split('/')[1]} has {len(content) - 2} bytes.*truncated"):
        RowStore(directory)
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(ValueError, match="corrupt"):
        RowStore(directory, verify=True)
    path.unlink()
    with pytest.raises(ValueError, match="is missing"):
        RowStore(directory)
    (directory / "manifest.json").write_text('{"format": 1')
    with pytest.raises(ValueError, match="damaged"):
        RowStore(directory)
    (directory / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no finished row store"):
        RowStore(directory)


def test_failure_while_building_loses_nothing(tmp_path: Path, monkeypatch):
    directory = build(tmp_path / "s", documents(20), seq_len=16, validation_fraction=0.0)

    def broken():
        yield from documents(300, seed=1)
        raise ValueError("the source broke")

    with pytest.raises(ValueError, match="the source broke"):
        build(directory, broken(), seq_len=16)
    assert RowStore(directory, verify=True).num_documents == 20

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(rows_module, "_write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        build(directory, documents(5), seq_len=16)
    assert RowStore(directory, verify=True).num_documents == 20
    assert [path.name for path in tmp_path.iterdir()] == ["s"]  # no leftovers


def test_bad_arguments_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match="align must divide seq_len = 16; got 5"):
        StoreConfig(seq_len=16, eos_id=0, align=5)
    with pytest.raises(ValueError, match=r"validation_fraction must lie in \[0, 1\); got 1"):
        StoreConfig(seq_len=16, eos_id=0, validation_fraction=1.0)
    with pytest.raises(ValueError, match="eos_id must be below the vocabulary size 259; got 259"):
        build_store(tmp_path / "s", [], TOKENIZER, StoreConfig(seq_len=16, eos_id=259), fingerprint="x")
    with pytest.raises(ValueError, match="no text"):
        build(tmp_path / "s", [], seq_len=16)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "x.jpg").touch()
    with pytest.raises(ValueError, match="is no row store"):
        build(tmp_path / "photos", documents(3), seq_len=16)
    directory = build(tmp_path / "s", documents(3), seq_len=16, validation_fraction=0.0)
    with pytest.raises(ValueError, match=r"'validation'.*has no rows"):
        RowStore(directory, "validation")
    with pytest.raises(ValueError, match="has no split 'test'"):
        RowStore(directory, "test")
    with pytest.raises(IndexError):
        RowStore(directory)[10**6]
