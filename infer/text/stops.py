"""Stop strings in a stream of text pieces."""

from collections.abc import Sequence


class StopScanner:
    """Passes text through until a stop string is complete; holds back what might become one.

    >>> scan = StopScanner(["END"])
    >>> scan.push("the E"), scan.push("NERGY"), scan.push(" EN"), scan.push("D of")
    (('the ', None), ('ENERGY', None), (' ', None), ('', 'END'))
    """

    def __init__(self, stops: Sequence[str]):
        if any(not stop for stop in stops):
            raise ValueError(f"stop strings must not be empty; got {list(stops)!r}")
        self.stops = tuple(stops)
        self.held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is certain, the stop string that ended it or None).

        The stop string that is complete first wins, of two that end together the longer one; so the result
        does not depend on how the text was cut into pieces. What follows a match is dropped.
        """
        text = self.held + text
        matches = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self.stops if stop in text]
        if matches:
            self.held = ""
            end, _, stop = min(matches)
            return text[: end - len(stop)], stop
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """What was held back, when the stream ends without completing a stop string."""
        held, self.held = self.held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that ends `text`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
