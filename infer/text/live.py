"""The block that is being decoded, redrawn in place on a terminal after every denoising pass."""

import shutil
import sys
from typing import Any, TextIO

import numpy as np

MASK = "▒"


class BlockView:
    """Call it with a `Block` after each pass: draws row 0 dimmed behind the cursor, which stays where it was.

    On a terminal the drawing is wiped before the next one and when nothing is masked any more; elsewhere every pass is
    one line on stderr.
    """

    def __init__(self, tokenizer: Any, out: TextIO | None = None):
        self.tokenizer = tokenizer
        self.out = sys.stdout if out is None else out

    def text(self, tokens: np.ndarray, masked: np.ndarray, skip: int) -> str:
        """The block as text, one `MASK` per masked token; ids where there is no tokenizer."""
        pieces: list[str] = []
        run: list[int] = []

        def flush() -> None:
            if run:
                shown = self.tokenizer.decode(run) if self.tokenizer is not None else " ".join(map(str, run))
                pieces.append(shown)
                run.clear()

        for token, hidden in zip(tokens[skip:].tolist(), masked[skip:].tolist(), strict=True):
            if hidden:
                flush()
                pieces.append(MASK)
            else:
                run.append(token)
        flush()
        return "".join(pieces)

    def __call__(self, block: Any) -> None:
        masked = np.asarray(block.masked)[0]
        text = self.text(np.asarray(block.tokens)[0], masked, int(np.asarray(block.skip)[0]))
        if not self.out.isatty():
            print(text.replace("\n", "\\n"), file=sys.stderr, flush=True)
            return
        # Make room below, so that drawing cannot scroll the saved place away; save the cursor, clear what follows, draw
        # dimmed, go back.
        columns, lines = shutil.get_terminal_size()
        rows = min(lines - 1, sum(1 + len(line) // columns for line in text.split("\n")))
        room = "\x1bD" * rows + f"\x1b[{rows}A"
        self.out.write(f"{room}\x1b7\x1b[J\x1b[2m{text}\x1b[0m\x1b8" + ("" if masked.any() else "\x1b[J"))
        self.out.flush()
