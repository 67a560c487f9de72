"""The iterator: exact resume, also on another number of processes; evaluation in order."""

import itertools

import numpy as np
import pytest

from train.data.batches import batches, evaluation_batches


class Numbers:
    """A stand-in store whose row i holds i."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"tokens": np.full(3, index + 1, np.int32), "loss_mask": np.ones(3, bool)}


def rows(batch) -> list[int]:
    assert batch["tokens"].shape[1:] == (3,)
    return (batch["tokens"][:, 0] - 1).tolist()


def open_all(count: int, **options):
    return [
        batches(Numbers(23), global_batch=4, seed=7, process_index=i, process_count=count, **options)
        for i in range(count)
    ]


def test_each_epoch_visits_every_row_once_in_another_order():
    iterator = batches(Numbers(20), global_batch=4, seed=7)
    first = [row for _ in range(5) for row in rows(next(iterator))]
    second = [row for _ in range(5) for row in rows(next(iterator))]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second and first != list(range(20))
    again = batches(Numbers(20), global_batch=4, seed=7)
    assert [row for _ in range(5) for row in rows(next(again))] == first
    other = batches(Numbers(20), global_batch=4, seed=8)
    assert [row for _ in range(5) for row in rows(next(other))] != first
    iterator.close()


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 1), (1, 2), (2, 4), (4, 2)])
def test_resume_survives_a_change_of_process_count(before, after):
    reference = open_all(1)
    expected = [rows(next(reference[0])) for _ in range(11)]
    first = open_all(before)
    for step in range(4):
        got = [rows(next(iterator)) for iterator in first]
        assert list(itertools.chain(*got)) == expected[step]
    states = [iterator.get_state() for iterator in first]
    assert all(state == states[0] for state in states)  # any process's state restores all
    second = open_all(after)
    for iterator in second:
        iterator.set_state(states[0])
    for step in range(4, 11):
        got = [rows(next(iterator)) for iterator in second]
        assert list(itertools.chain(*got)) == expected[step]


def test_evaluation_covers_all_rows_once_and_pads():
    for count in (1, 2):
        seen, sizes = [], []
        for process in range(count):
            for batch in evaluation_batches(Numbers(10), global_batch=4, process_index=process, process_count=count):
                sizes.append(len(batch["tokens"]))
                seen += [row for row, real in zip(rows(batch), batch["loss_mask"][:, 0]) if real]
        assert sorted(seen) == list(range(10))
        assert sizes == [4 // count] * (3 * count)
    few = [rows(batch) for batch in evaluation_batches(Numbers(10), global_batch=2, max_rows=3)]
    assert few == [[0, 4], [9, -1]]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="multiple of 2 processes; got 3"):
        batches(Numbers(5), global_batch=3, seed=0, process_count=2)
    with pytest.raises(ValueError, match=r"process_index must lie in 0\.\.1; got 2"):
        batches(Numbers(5), global_batch=4, seed=0, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="empty"):
        batches(Numbers(0), global_batch=4, seed=0)
    with pytest.raises(ValueError, match="max_rows"):
        next(evaluation_batches(Numbers(5), global_batch=4, max_rows=0))
