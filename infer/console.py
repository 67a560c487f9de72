"""What the command lines print besides their results: short lines on stderr. Imports no JAX."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


def note(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def timed(what: str, quiet: bool = False) -> Iterator[None]:
    """Prints "what … n s" on stderr, the first part at once."""
    if quiet:
        yield
        return
    print(f"{what} … ", end="", file=sys.stderr, flush=True)
    started = time.perf_counter()
    try:
        yield
    except BaseException:
        note("failed")
        raise
    note(f"{time.perf_counter() - started:.1f} s")


class CompileNotes:
    """Prints "compiling NAME … n s" on stderr; hand it to a decoder as `on_compile`."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet

    def __call__(self, name: str, seconds: float | None) -> None:
        if self.quiet:
            return
        if seconds is None:
            print(f"compiling {name} … ", end="", file=sys.stderr, flush=True)
        else:
            note(f"{seconds:.1f} s")
