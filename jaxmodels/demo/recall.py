"""Multi-query associative recall in long noise: a synthetic test of what attention still finds.

A row of T tokens: a first token, then noise in which pairs (key, value) are hidden at random places, and at the end
the keys once more in another order, each followed by its value. A model that reads a key of the last part must say the
value that stood behind it far above. Noise tokens follow Zipf's law, as words do. Keys, values and noise are different
tokens; the keys of a row are different from each other, its values need not be. A value has one token, or several, all
of which are asked for, the later ones with the earlier ones in sight.

Chance: 1 / num_values for a model that knows nothing; about 1 / num_pairs for one that names some value of the row.
"""

import dataclasses

import numpy as np

START = 0


@dataclasses.dataclass(frozen=True)
class Recall:
    """The task; token ids are START, then keys, values, noise.

    Attributes:
      length: tokens of a row (T).
      num_pairs: pairs hidden in it, all of which are asked for.
      num_keys, num_values, num_noise: sizes of the three vocabularies.
      value_length: tokens of a value.
    """

    length: int
    num_pairs: int = 16
    num_keys: int = 128
    num_values: int = 128
    num_noise: int = 255
    value_length: int = 1

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} must be at least 1; got {getattr(self, field.name)}")
        if self.num_pairs > self.num_keys:
            raise ValueError(f"num_pairs must be at most num_keys={self.num_keys}; got {self.num_pairs}")
        if self.num_pairs > self.most_pairs(self.length, self.value_length):
            raise ValueError(f"length must hold every pair twice and a first token; got {self.length}")

    @staticmethod
    def most_pairs(length: int, value_length: int = 1) -> int:
        """Pairs that a row holds, each of them twice beside the first token."""
        return (length - 1) // (2 * (1 + value_length))

    @property
    def vocab_size(self) -> int:
        return 1 + self.num_keys + self.num_values + self.num_noise

    @property
    def context(self) -> int:
        """Tokens before the first key that is asked for."""
        return self.length - (1 + self.value_length) * self.num_pairs

    @property
    def questions(self) -> np.ndarray:
        """Positions whose next token is an answer: keys that are asked for, and all but the last token of values."""
        pairs = np.arange(self.context, self.length).reshape(self.num_pairs, -1)
        return pairs[:, :-1].reshape(-1)

    def rows(self, rng: np.random.Generator, count: int, text: np.ndarray | None = None) -> np.ndarray:
        """`count` rows, int32 `[count, length]`.

        Args:
          rng: what is drawn from.
          count: rows.
          text: integers below `num_noise`, one after the other: a piece of it from a random place stands in each row
            instead of noise.
        """
        if text is None:
            shares = np.cumsum(1.0 / np.arange(1, self.num_noise + 1))
            noise = np.searchsorted(shares / shares[-1], rng.random((count, self.length)), side="right")
        else:
            if len(text) < self.length:
                raise ValueError(f"text must have at least the {self.length} tokens of a row; got {len(text)}")
            starts = rng.integers(0, len(text) - self.length + 1, count)
            noise = text[starts[:, None] + np.arange(self.length)].astype(np.int64)
        tokens = (1 + self.num_keys + self.num_values + np.minimum(noise, self.num_noise - 1)).astype(np.int32)
        tokens[:, 0] = START
        keys = 1 + np.argsort(rng.random((count, self.num_keys)), axis=1)[:, : self.num_pairs]
        drawn = rng.integers(0, self.num_values, (count, self.num_pairs, self.value_length))
        pairs = np.concatenate([keys[..., None], 1 + self.num_keys + drawn], axis=2)
        # Places of the size of a pair, so that pairs do not overlap; their order is random too.
        size = 1 + self.value_length
        places = np.argsort(rng.random((count, (self.context - 1) // size)), axis=1)[:, : self.num_pairs]
        at = 1 + size * places[..., None] + np.arange(size)
        tokens[np.arange(count)[:, None, None], at] = pairs
        tokens[:, self.context :] = pairs.reshape(count, -1)
        return tokens
