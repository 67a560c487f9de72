"""Stop strings: nothing of a completed one is emitted, however the text is cut."""

import itertools

import pytest

from infer.text.stops import StopScanner


def run(text, stops, cuts):
    """(emitted text, stop string) when `text` arrives in pieces cut at `cuts`."""
    scanner, out = StopScanner(stops), []
    edges = [0, *cuts, len(text)]
    for start, end in itertools.pairwise(edges):
        piece, stop = scanner.push(text[start:end])
        out.append(piece)
        if stop is not None:
            return "".join(out), stop
    return "".join(out) + scanner.flush(), None


CASES = [
    ("hello END of", ["END"], "hello ", "END"),
    ("the ENERGY EN", ["END"], "the ENERGY EN", None),
    ("aaab", ["aab"], "a", "aab"),
    ("xabcd", ["abcd", "bc"], "xa", "bc"),  # complete first
    ("xabc", ["abc", "c"], "x", "abc"),  # end together: the longer
    ("ababac", ["abac"], "ab", "abac"),
    ("é\n\nü", ["\n\n"], "é", "\n\n"),
    ("no stops", [], "no stops", None),
    ("STOP", ["STOP"], "", "STOP"),
]


@pytest.mark.parametrize("text, stops, emitted, stop", CASES)
def test_every_way_to_cut_the_text_gives_the_same(text, stops, emitted, stop):
    positions = range(1, len(text))
    for count in range(len(text)):
        for cuts in itertools.islice(itertools.combinations(positions, count), 60):
            assert run(text, stops, cuts) == (emitted, stop), cuts


def test_no_piece_shows_the_beginning_of_a_stop_string_that_is_completed_later():
    scanner = StopScanner(["</answer>"])
    assert scanner.push("42 <") == ("42 ", None)
    assert scanner.push("/ans") == ("", None)
    assert scanner.push("wer>!") == ("", "</answer>")
    assert scanner.flush() == ""


def test_what_turns_out_to_be_no_stop_string_is_emitted():
    scanner = StopScanner(["###"])
    assert scanner.push("## ") == ("## ", None)
    assert scanner.push("##") == ("", None)
    assert scanner.flush() == "##"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="stop strings must not be empty"):
        StopScanner(["a", ""])
