"""What counts as a valid completion, and the statistics about them."""

import textwrap

import numpy as np
import pytest

from jaxmodels.demo.completions import (
    choose_cuts,
    find_cuts,
    longest_matches,
    mean_interval,
    normalise,
    paired_difference,
    parse_completion,
    wilson_interval,
)

CONTEXT = "class A:\n    def f(self, x):\n        y = x + 1"


def completion(*lines: str) -> str:
    return "".join("\n" + line for line in lines)


@pytest.mark.parametrize(
    ("lines", "parses", "statements"),
    [
        (["        z = 1", "        return z", ""], True, 2),
        (["        z = 1", "        return z"], True, 1),  # the last line may be unfinished
        (["        z = (1,", "             2", ""], True, 0),  # inside a bracket
        (["        z = 1", '        """Text', "        more", "", "    x ="], True, 1),  # inside a string
        (["        z = 'abc", "        w = 1", "        v = 2", ""], False, 0),  # broken string, lines after it
        (["        z = 1", "     w = 2", "        v = 3", ""], False, 0),  # dedent to nowhere
        (["        z = = 1", "        w = 2", ""], False, 0),
        (["        if y:", "            z = 1", "        else:", ""], True, 2),  # the header alone is dropped
        (["        try:", "            z = 1", "            w = 2", ""], True, 3),  # open try
        (["        try:", "            z = 1", "        except E:", "            pass", "        w = 2", ""], True, 4),
        (["        try:", "            z = 1", "        w = 2", ""], False, 0),  # try left without except
        (["", "    @property", "    def g(self):", ""], True, 0),
        (["", "    @property", "    def g(self):", "        return 1", ""], True, 2),
        ([], True, 0),
        (["        # only a comment", ""], True, 0),
        ([" z"], False, 0),
        (["        elif y:", "            z = 1", ""], False, 0),  # there is no if before it
    ],
)
def test_cut_to_the_last_complete_statement(lines, parses, statements):
    result = parse_completion(CONTEXT, completion(*lines), ended=False)
    assert (result.parses, result.statements) == (parses, statements), result


def test_context_decides_what_fits():
    inside = "def f(x):\n    if x:\n        y = 1"
    assert parse_completion(inside, "\n    else:\n        y = 2\n", ended=False).parses
    tried = "def f(x):\n    try:\n        y = 1"
    assert parse_completion(tried, "\n        z = 1\n        w = 1\n", ended=False).statements == 2
    assert parse_completion(tried, "\n    finally:\n        y = 2\n", ended=False).statements == 1
    header = "def f(x):"
    assert not parse_completion(header, "\nx = 1\n", ended=False).parses
    assert parse_completion(header, "\n    return x\n", ended=False).statements == 1


def test_an_ended_text_must_be_complete():
    assert parse_completion(CONTEXT, "\n        return y", ended=True).statements == 1
    assert not parse_completion(CONTEXT, "\n        return (y", ended=True).statements
    assert parse_completion(CONTEXT, "", ended=True).statements == 0


def test_repetition_is_measured():
    same = parse_completion(CONTEXT, completion(*["        z = 1"] * 4, ""), ended=False)
    assert same.statements == 4 and same.distinct == 0.25
    other = parse_completion(CONTEXT, completion(*[f"        z = {i}" for i in range(4)], ""), ended=False)
    assert other.distinct == 1.0


def test_prompts_are_cut_after_complete_lines():
    text = textwrap.dedent(
        '''\
        """Doc."""
        import os

        def f(x):
            y = (1,
                 2)  # why
            if x:
                return y

        def g():
            pass
        '''
    )
    cuts = find_cuts("m.py", text, min_context=10)
    contexts = [cut.context for cut in cuts]
    assert all(text.count(context) >= 1 for context in contexts)
    assert any(context.endswith("2)  # why") for context in contexts)
    assert not any(context.endswith("(1,") for context in contexts)
    assert any(context.startswith("def f") and context.endswith("return y") for context in contexts)
    for cut in cuts:  # the file's own continuation always parses
        rest = text.split(cut.context, 1)[1]
        assert parse_completion(cut.context, rest, ended=False).parses
    assert find_cuts("m.py", text, min_context=10, max_context=12) == [cut for cut in cuts if len(cut.context) <= 12]
    assert len(choose_cuts(cuts, 3, 0)) == 3 and choose_cuts(cuts, 3, 0) == choose_cuts(cuts, 3, 0)
    with pytest.raises(ValueError, match="count must be at most"):
        choose_cuts(cuts, 1000, 0)


def brute_longest(query: list[int], corpus: list[int]) -> int:
    text = "," + ",".join(map(str, corpus)) + ","
    best = 0
    for i in range(len(query)):
        for j in range(i + 1, len(query) + 1):
            if "," + ",".join(map(str, query[i:j])) + "," in text:
                best = max(best, j - i)
    return best


def test_longest_match_equals_brute_force():
    rng = np.random.default_rng(0)
    for vocab in (2, 5, 50):
        corpus = rng.integers(0, vocab, 300)
        queries = [rng.integers(0, vocab, n) for n in (0, 1, 2, 7, 30, 40)] + [corpus[20:60], corpus[-3:]]
        expected = [brute_longest(q.tolist(), corpus.tolist()) for q in queries]
        assert longest_matches(queries, corpus).tolist() == expected
    assert longest_matches([np.array([7, 7])], np.array([1, 2])).tolist() == [0]


def test_normalised_text_ignores_depth():
    assert normalise("    if x:\n\n        y = 1\n") == normalise("if x:\n y = 1") == "if x:\ny = 1"


def test_intervals():
    assert wilson_interval(0, 10) == (pytest.approx(0.0, abs=1e-12), pytest.approx(0.2775, abs=1e-3))
    assert wilson_interval(50, 100) == (pytest.approx(0.4038, abs=1e-3), pytest.approx(0.5962, abs=1e-3))
    with pytest.raises(ValueError, match="0 of 0"):
        wilson_interval(0, 0)
    rng = np.random.default_rng(1)
    groups = [f"g{i // 20}" for i in range(2000)]
    effect = np.repeat(rng.normal(0, 1, 100), 20)  # all of it between groups
    mean, low, high = mean_interval(effect, groups)
    assert low < mean < high and high - low == pytest.approx(4 * effect.std() / 10, rel=0.25)
    mean, low, high = paired_difference([False] * 4, [True] * 4, list("aabb"))
    assert (mean, low, high) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="one length"):
        paired_difference([True], [True, False], ["a"])
