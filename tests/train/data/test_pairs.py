"""Prompt and completion rows, and mixtures of row sources."""

import collections

import numpy as np
import pytest

from train.data.batches import Rows
from train.data.pairs import Mixture, PairRows


def test_a_row_teaches_its_completion_only(tmp_path):
    rows = PairRows.from_pairs([([5, 6], [7, 8, 9]), ([], [1])], 6)
    assert isinstance(rows, Rows) and len(rows) == 2
    row = rows[0]
    np.testing.assert_array_equal(row["tokens"], [5, 6, 7, 8, 9, 0])
    np.testing.assert_array_equal(row["loss_mask"], [0, 0, 1, 1, 1, 0])
    np.testing.assert_array_equal(row["segment_ids"], [1, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(row["positions"], [0, 1, 2, 3, 4, 0])
    assert {name: str(value.dtype) for name, value in row.items()} == {
        "tokens": "int32", "segment_ids": "int32", "positions": "int32", "loss_mask": "bool"
    }  # fmt: skip
    np.testing.assert_array_equal(rows[1]["loss_mask"], [1, 0, 0, 0, 0, 0])
    rows.save(tmp_path / "pairs.npz")
    again = PairRows.load(tmp_path / "pairs.npz")
    assert again.fingerprint == rows.fingerprint
    assert PairRows.from_pairs([([5, 6], [7, 8, 9]), ([2], [1])], 6).fingerprint != rows.fingerprint
    for bad in (-1, 2):
        with pytest.raises(IndexError):
            rows[bad]


@pytest.mark.parametrize(
    "pairs, message",
    [
        ([([1], [2]), ([1, 2], [3, 4, 5])], "pair 1 has 5 tokens, more than a row of 4"),
        ([([1, 2], [])], "row 0 must have 0 <= prompt < length <= 4; got a prompt of 2 and a length of 2"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(pairs, message):
    with pytest.raises(ValueError, match=message):
        PairRows.from_pairs(pairs, 4)


def test_a_mixture_keeps_its_shares_and_reaches_every_row():
    one = PairRows.from_pairs([([], [i]) for i in range(30)], 2)
    two = PairRows.from_pairs([([], [100 + i]) for i in range(4)], 2)
    mixed = Mixture([(one, 3.0), (two, 1.0)])
    assert len(mixed) == 40
    seen = collections.Counter(int(mixed[i]["tokens"][0]) for i in range(len(mixed)))
    assert set(seen) == {*range(30), *range(100, 104)}
    assert sum(count for token, count in seen.items() if token >= 100) == 10
    assert max(seen[100 + i] for i in range(4)) - min(seen[100 + i] for i in range(4)) <= 1
    with pytest.raises(IndexError):
        mixed[40]
    for parts in ([], [(one, 0.0)]):
        with pytest.raises(ValueError, match="part"):
            Mixture(parts)
