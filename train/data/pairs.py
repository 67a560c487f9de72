"""Prompts with completions as rows of training data, and several sources of rows mixed into one."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train.data.batches import Batch, Rows


class PairRows:
    """One prompt and its completion per row; the prompt is read, the completion is learnt, the rest is padding.

    `rows[i]` has the arrays of a `RowStore`: `tokens`, `segment_ids` (0 = padding), `positions`, `loss_mask`.
    """

    def __init__(self, tokens: np.ndarray, prompt_lengths: np.ndarray, lengths: np.ndarray):
        """Rows from arrays, as `from_pairs` makes them.

        Args:
            tokens: integers [N, T].
            prompt_lengths: [N], leading tokens that are the prompt.
            lengths: [N], tokens of prompt and completion; the rest of a row is padding.

        Raises:
            ValueError: shapes or lengths that do not fit.
        """
        shapes = (tokens.ndim, prompt_lengths.shape, lengths.shape)
        if shapes != (2, tokens.shape[:1], tokens.shape[:1]):
            raise ValueError(
                f"tokens must be [N, T] and both lengths [N]; got {tokens.shape}, {prompt_lengths.shape} and "
                f"{lengths.shape}"
            )
        wrong = (prompt_lengths < 0) | (prompt_lengths >= lengths) | (lengths > tokens.shape[1])
        if wrong.any():
            i = int(np.argmax(wrong))
            raise ValueError(
                f"row {i} must have 0 <= prompt < length <= {tokens.shape[1]}; got a prompt of {prompt_lengths[i]} and "
                f"a length of {lengths[i]}"
            )
        self.tokens, self.prompt_lengths, self.lengths = tokens, prompt_lengths, lengths

    @classmethod
    def from_pairs(cls, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], seq_len: int) -> "PairRows":
        """Rows of `seq_len` tokens from (prompt, completion) ids; raises ValueError for a pair that is longer."""
        tokens = np.zeros((len(pairs), seq_len), np.uint32)
        prompts, lengths = np.zeros(len(pairs), np.int32), np.zeros(len(pairs), np.int32)
        for i, (prompt, completion) in enumerate(pairs):
            ids = [*prompt, *completion]
            if len(ids) > seq_len:
                raise ValueError(f"pair {i} has {len(ids)} tokens, more than a row of {seq_len}")
            tokens[i, : len(ids)] = ids
            prompts[i], lengths[i] = len(prompt), len(ids)
        return cls(tokens, prompts, lengths)

    def save(self, path: Path) -> None:
        """Writes an `.npz` file, atomically."""
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("wb") as file:
            np.savez_compressed(file, tokens=self.tokens, prompt_lengths=self.prompt_lengths, lengths=self.lengths)
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> "PairRows":
        """What `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["tokens"], arrays["prompt_lengths"], arrays["lengths"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content; a resumed run compares it."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.prompt_lengths, self.lengths):
            digest.update(str((array.shape, array.dtype.str)).encode() + array.tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:  # grain records it beside the iterator state
        return f"PairRows({self.fingerprint[:16]}, rows={len(self)})"

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        place = np.arange(self.tokens.shape[1], dtype=np.int32)
        real = place < self.lengths[index]
        return {
            "tokens": np.where(real, self.tokens[index], 0).astype(np.int32),
            "segment_ids": real.astype(np.int32),
            "positions": np.where(real, place, 0),
            "loss_mask": real & (place >= self.prompt_lengths[index]),
        }


class Mixture:
    """Rows of several sources with fixed shares; within an epoch each source is repeated as its share asks.

    An epoch has as many rows as it takes to go once through every source.
    """

    def __init__(self, parts: Sequence[tuple[Rows, float]]):
        """Mixes.

        Args:
            parts: (rows, share) with positive shares; only their ratios count.

        Raises:
            ValueError: no part, an empty one, or a share that is not positive.
        """
        if not parts:
            raise ValueError("parts must not be empty")
        for rows, share in parts:
            if not len(rows) or not share > 0:
                raise ValueError(f"every part must have rows and a positive share; got {len(rows)} rows at {share}")
        self._parts = [rows for rows, _ in parts]
        total = sum(share for _, share in parts)
        shares = [share / total for _, share in parts]
        epoch = max(len(rows) / share for rows, share in zip(self._parts, shares, strict=True))
        self._ends = np.cumsum([round(epoch * share) for share in shares])

    def __repr__(self) -> str:
        return f"Mixture({self._parts}, rows={len(self)})"

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        part = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[part - 1]) if part else 0
        return self._parts[part][(index - start) % len(self._parts[part])]
