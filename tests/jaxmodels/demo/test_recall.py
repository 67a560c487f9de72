"""The recall task: every question has exactly one answer, far above."""

import numpy as np
import pytest

from jaxmodels.demo.recall import START, Recall


@pytest.mark.parametrize(
    "task", [Recall(64, 7), Recall(61, 15, 15, 3, 2), Recall(512, 32), Recall(256, 16, 20, 4, 9, 3)]
)
def test_every_question_has_one_answer(task):
    rows = task.rows(np.random.default_rng(0), 20)
    assert rows.shape == (20, task.length) and rows.dtype == np.int32
    assert (rows[:, 0] == START).all() and rows.max() < task.vocab_size and (rows[:, 1:] > START).all()
    context, length = task.context, task.value_length
    assert task.context == task.length - (1 + length) * task.num_pairs
    is_key = (rows >= 1) & (rows <= task.num_keys)
    is_value = (rows > task.num_keys) & (rows <= task.num_keys + task.num_values)
    for row, keys, values in zip(rows, is_key, is_value):
        asked = row[task.questions[::length]]
        assert len(set(asked)) == keys[:context].sum() == task.num_pairs
        assert values[:context].sum() == task.num_pairs * length
        for key, answer in zip(asked, row[task.questions + 1].reshape(task.num_pairs, length)):
            (place,) = np.flatnonzero(row[:context] == key)
            np.testing.assert_array_equal(row[place + 1 : place + 1 + length], answer)
            assert values[place + 1 : place + 1 + length].all()
    places = np.stack([np.flatnonzero(keys[:context]) for keys in is_key])
    assert (places.min(axis=0) < context // 2).any() and places.std() > context / 8  # anywhere


def test_draws_repeat_and_noise_is_uneven():
    task = Recall(400, 4)
    same = (task.rows(np.random.default_rng(1), 8) for _ in range(2))
    np.testing.assert_array_equal(*same)
    noise = task.rows(np.random.default_rng(0), 64)
    counts = np.bincount(noise[noise > task.num_keys + task.num_values], minlength=task.vocab_size)
    first = 1 + task.num_keys + task.num_values
    assert counts[first] / counts[first + 9] == pytest.approx(10, rel=0.3)  # Zipf


def test_text_stands_between_the_pairs():
    task = Recall(64, 3, num_noise=1000)
    text = np.arange(200, 900, dtype=np.uint16)
    for row in task.rows(np.random.default_rng(0), 5, text):
        is_text = row > task.num_keys + task.num_values
        noise = row - 1 - task.num_keys - task.num_values - np.arange(64)  # one piece, cut out where pairs stand
        assert is_text.sum() == 63 - 4 * 3 and len(set(noise[is_text])) == 1 and noise[is_text][0] >= 200
    with pytest.raises(ValueError, match="text must have at least the 64 tokens of a row; got 63"):
        task.rows(np.random.default_rng(0), 1, text[:63])


def test_impossible_tasks_are_explained():
    with pytest.raises(ValueError, match="num_pairs must be at most num_keys=8; got 9"):
        Recall(400, 9, num_keys=8)
    with pytest.raises(ValueError, match="length must hold every pair twice and a first token; got 40"):
        Recall(40, 10)
    with pytest.raises(ValueError, match="length must hold every pair twice and a first token; got 64"):
        Recall(64, 8, value_length=3)
    with pytest.raises(ValueError, match="num_noise must be at least 1; got 0"):
        Recall(40, 2, num_noise=0)
