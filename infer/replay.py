"""Block diffusion in a terminal: each block is replayed in the order in which its tokens were fixed."""

import collections
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import rich.console
import rich.live
import rich.text

MASKED = "·"
"""Stands for a token that is not fixed yet; how long its text will be is unknown."""
TOGETHER, FRESH = "green", "bold black on green"


class Replay:
    """Prints blocks of one completion as they come; use it as a context.

    On a terminal every denoising pass is one frame: tokens that it fixed stand out, masked ones are dots. Text that
    is finished is green where a pass fixed several tokens at once. Elsewhere (a pipe, a file) the text is printed
    plain and without pauses.

    Args:
        console: where to print.
        tokenizer: a byte-level jaxmodels Tokenizer.
        pause: seconds per frame.
    """

    def __init__(self, console: rich.console.Console, tokenizer: Any, *, pause: float):
        self.console, self.tokenizer, self.pause = console, tokenizer, pause
        self.decoder = tokenizer.stream()
        self.line = rich.text.Text()  # finished text of the last line, which may go on
        self.frames: rich.live.Live | None = None

    def __enter__(self) -> "Replay":
        if self.console.is_terminal and not self.console.quiet:
            self.frames = rich.live.Live(console=self.console, auto_refresh=False, transient=True)
            self.frames.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.frames is not None:
            self.frames.stop()
        self.line.append(self.decoder.flush())
        self.console.print(self.line, soft_wrap=True)

    def block(self, tokens: Sequence[int], reveal: Sequence[int]) -> None:
        """Prints one block.

        Args:
            tokens: its tokens.
            reveal: denoising pass, from 0, at which each was fixed.
        """
        if self.frames is not None:
            for frame in range(max(reveal, default=-1) + 1):
                self.frames.update(self._frame(tokens, reveal, frame), refresh=True)
                time.sleep(self.pause)
        sizes = collections.Counter(reveal)
        for token, step in zip(tokens, reveal, strict=True):
            self.line.append(self.decoder.push([token]), TOGETHER if sizes[step] > 1 else "")
        *finished, self.line = self.line.split("\n", allow_blank=True) or [rich.text.Text()]
        for line in finished:
            self.console.print(line, soft_wrap=True)
        if self.frames is not None:
            self.frames.update(self.line, refresh=True)

    def _frame(self, tokens: Sequence[int], reveal: Sequence[int], frame: int) -> rich.text.Text:
        text = self.line.copy()
        for token, step in zip(tokens, reveal, strict=True):
            if step > frame:
                text.append(MASKED, "dim")
            else:
                text.append(self.tokenizer.decode([token]), FRESH if step == frame else "")
        return text
