"""Judging completions of Python code: where prompts are cut, what is valid, what is copied, and how sure we are.

A completion counts as valid when

- the text before it and the completion, cut to its last complete statement, parse together,
- it holds at least `MIN_STATEMENTS` new statements, and
- it is no copy: the longest stretch that also stands in the training files is shorter than half of it.

Plain Python and NumPy; no model in here.
"""

import ast
import dataclasses
import io
import re
import tokenize
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, Int

MIN_STATEMENTS = 3
MAX_COPIED = 0.5


@dataclasses.dataclass(frozen=True)
class PromptCut:
    """A place in a file where a completion starts.

    Attributes:
        path: of the file.
        context: from the first line of the enclosing top-level statement (or an earlier one) to the cut.
            It ends with the last character of a complete logical line, so the completion starts with the
            line break.
    """

    path: str
    context: str


def find_cuts(path: str, text: str, *, min_context: int = 400, max_context: int = 12_000) -> list[PromptCut]:
    """All places of a file where a prompt may end: after a complete logical line that is no comment.

    Args:
        path: recorded.
        text: the file; must parse.
        min_context: characters of context at least; earlier top-level statements are added to reach it.
        max_context: places that need more context than that are left out; parsing them would take too long.
    """
    lines = text.splitlines(keepends=True)
    offsets = np.cumsum([0, *map(len, lines)])
    tops = [0]  # offsets where a top-level statement begins
    for node in ast.parse(text).body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        tops.append(int(offsets[first - 1]))
    cuts = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.NEWLINE or not token.string:
            continue
        end = int(offsets[token.start[0] - 1]) + token.start[1]
        start = max((top for top in tops if top <= end - min_context), default=None)
        if start is not None and end - start <= max_context and end < len(text) - 1:
            cuts.append(PromptCut(path, text[start:end]))
    return cuts


def choose_cuts(cuts: Iterable[PromptCut], count: int, seed: int) -> list[PromptCut]:
    """`count` of them, drawn without replacement, in an order that is itself random.

    Raises:
        ValueError: fewer are there.
    """
    cuts = list(cuts)
    if count > len(cuts):
        raise ValueError(f"count must be at most the {len(cuts)} places where a prompt may end; got {count}")
    chosen = np.random.default_rng(seed).permutation(len(cuts))[:count]
    return [cuts[i] for i in chosen]


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A completion after the cut to its last complete statement.

    Attributes:
        text: what is left of it.
        parses: whether it parses after its context.
        statements: new statements, nested ones included; 0 if it does not parse.
        distinct: how many of the statements without a body differ, of all of these; 1.0 means no repetition.
    """

    text: str
    parses: bool
    statements: int
    distinct: float


def parse_completion(context: str, completion: str, *, ended: bool) -> Parsed:
    """Cuts a completion to its last complete statement and parses it after its context.

    Only what a length limit can cause is forgiven: an unfinished last logical line, and blocks that are
    still open at the end (a header or decorator without its body is dropped, an open `try` is closed).

    Args:
        context: code before it, ending with a complete logical line without its line break.
        completion: generated text.
        ended: the model ended it itself, so its last line is complete.
    """
    text = context + completion + ("\n" if ended else "")
    lines, broken = _logical_lines(text)
    new = [line for line in lines if line.start >= len(context)]
    if broken:
        return Parsed(completion, False, 0, 0.0)
    while new and new[-1].opens:
        new.pop()
    text = text[: new[-1].end] if new else context + "\n"
    closing = _open_tries([line for line in lines if line.start < len(context)] + new)
    if not new and any(line.opens for line in lines[-1:]):
        return Parsed("", True, 0, 1.0)  # not even the body of the header before the cut
    code = text + "".join(f"{' ' * indent}finally:\n{' ' * indent} pass\n" for indent in closing)
    kept = text[len(context) :]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # odd escapes in strings: valid, and not ours to report
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return Parsed(kept, False, 0, 0.0)
    first, last = context.count("\n") + 2, text.count("\n")
    statements = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and first <= n.lineno <= last]
    plain = [ast.dump(n) for n in statements if not hasattr(n, "body")]
    return Parsed(kept, True, len(statements), len(set(plain)) / len(plain) if plain else 1.0)


@dataclasses.dataclass(frozen=True)
class _Line:
    """One logical line: offsets of its first token and of the text after its line break."""

    start: int
    end: int
    indent: int
    first: str
    opens: bool  # a block header or a decorator


def _logical_lines(text: str) -> tuple[list[_Line], bool]:
    """Complete logical lines, and whether the text is broken elsewhere than at its end."""
    offsets = np.cumsum([0, *map(len, text.splitlines(keepends=True))])
    lines: list[_Line] = []
    first: tokenize.TokenInfo | None = None
    last: tokenize.TokenInfo | None = None
    ignored = (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in ignored:
                continue
            if token.type == tokenize.NEWLINE:
                # Without a line break (an empty string) the line is not complete.
                if first is not None and last is not None and token.string:
                    end = int(offsets[token.end[0] - 1]) + token.end[1]
                    start = int(offsets[first.start[0] - 1]) + first.start[1]
                    opens = last.string == ":" or first.string == "@"
                    lines.append(_Line(start, end, first.start[1], first.string, opens))
                first = None
                continue
            first, last = first or token, token
    except tokenize.TokenError as error:
        message, (row, _) = error.args
        at_end = row >= len(offsets) - 1 or "EOF in multi-line" in message or "triple-quoted" in message
        return lines, not at_end
    except SyntaxError:  # indentation that fits no block
        return lines, True
    return lines, False


def _open_tries(lines: Sequence[_Line]) -> list[int]:
    """Indentations of `try` blocks without `except` or `finally` that the last line is inside of, innermost first."""
    stack: list[tuple[int, bool]] = []
    for line in lines:
        while stack and stack[-1][0] >= line.indent:
            stack.pop()
        if line.opens:
            stack.append((line.indent, line.first == "try"))
    return [indent for indent, is_try in reversed(stack) if is_try]


def normalise(text: str) -> str:
    """Without indentation and blank lines, so that code copied to another depth is found."""
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def longest_matches(queries: Sequence[np.ndarray], corpus: Int[np.ndarray, " N"], *, stop: int = 4096) -> np.ndarray:
    """Length of the longest run of tokens of each query that occurs anywhere in the corpus.

    All queries are extended together by one token a round, so the cost is one pass over the corpus per
    length that any query still matches. Equality is that of 64-bit rolling hashes (a false match needs a
    collision: below 1e-6 for a billion comparisons).

    Args:
        queries: token ids, one array of any length each.
        corpus: token ids; put a separator that no query holds between documents.
        stop: longest length looked for.

    Returns:
        int64, one length per query.
    """
    found = np.zeros(len(queries), np.int64)
    if not len(queries):
        return found
    largest = max([int(corpus.max(initial=0)), *(int(np.max(q, initial=0)) for q in queries)])
    code = np.random.default_rng(0).integers(1, 2**63, largest + 1, dtype=np.uint64) | np.uint64(1)
    lengths = np.array([len(q) for q in queries])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    flat = np.concatenate([code[np.asarray(q, np.int64)] for q in queries])
    text = code[corpus]
    owner = np.repeat(np.arange(len(queries)), lengths)
    last = starts[owner + 1]  # first position after the query
    base = np.uint64(0x9E3779B97F4A7C15)
    # Places in queries and corpus whose runs of the current length occur on the other side, and their hashes:
    # a longer match starts at such a place, so both sets only shrink.
    here, there = np.arange(len(flat)), np.arange(len(text))
    mine, theirs = np.zeros(len(flat), np.uint64), np.zeros(len(text), np.uint64)
    for length in range(1, stop + 1):
        here_fits, there_fits = here + length <= last[here], there + length <= len(text)
        here, mine, there, theirs = here[here_fits], mine[here_fits], there[there_fits], theirs[there_fits]
        mine = mine * base + flat[here + length - 1]  # wraps around
        theirs = theirs * base + text[there + length - 1]
        common = np.intersect1d(mine, theirs)
        mine_known, theirs_known = _member(mine, common), _member(theirs, common)
        here, mine, there, theirs = here[mine_known], mine[mine_known], there[theirs_known], theirs[theirs_known]
        if not len(here):
            break
        np.maximum.at(found, owner[here], length)
    return found


def _member(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Whether each value is in the sorted array."""
    if not len(ordered):
        return np.zeros(len(values), bool)
    return ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values


def wilson_interval(successes: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval (by default) of a proportion, Wilson's score method.

    Raises:
        ValueError: total is 0 or successes are not in 0..total.
    """
    if total < 1 or not 0 <= successes <= total:
        raise ValueError(f"successes must lie in 0..total with total > 0; got {successes} of {total}")
    p, n = successes / total, total
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return float(centre - half), float(centre + half)


def paired_difference(
    first: Sequence[bool] | np.ndarray,
    second: Sequence[bool] | np.ndarray,
    groups: Sequence[str],
    *,
    samples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean of second - first and its 95 % interval, by a bootstrap over whole groups.

    Prompts of one file are not independent, so files are drawn, with all their prompts.

    Args:
        first: outcome of each prompt under one arm.
        second: outcome of the same prompts under the other.
        groups: file of each prompt.
        samples: bootstrap samples.
        seed: of the bootstrap.
    """
    difference = np.asarray(second, float) - np.asarray(first, float)
    if not len(difference) == len(groups) > 0 or len(first) != len(second):
        raise ValueError(
            f"first, second and groups must have one length above 0; got {len(first)}, {len(second)}, {len(groups)}"
        )
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(index, difference)
    counts = np.bincount(index)
    rng = np.random.default_rng(seed)
    means = np.empty(samples)
    for chunk in np.array_split(np.arange(samples), max(1, samples // 1000)):
        drawn = rng.integers(0, len(sums), (len(chunk), len(sums)))
        means[chunk] = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def mean_interval(values: Float[np.ndarray, " n"], groups: Sequence[str], **options) -> tuple[float, float, float]:
    """Mean and 95 % interval by the bootstrap of `paired_difference`."""
    return paired_difference(np.zeros(len(values)), values, groups, **options)
