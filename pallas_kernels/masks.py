"""Structured attention masks: one elementwise predicate each, and tile schedules derived from it.

A mask is a small frozen dataclass. `allowed(q, k)` is its definition; `dense(T, S)` is the boolean truth that
every test compares with; `schedule(...)` lists the tiles of a `T x S` score matrix that hold at least one allowed
pair, so that kernels visit nothing else. Masks are hashable: pass them as static arguments.
"""

import dataclasses
import functools
from typing import Any, Literal

import numpy as np

Intervals = list[tuple[Any, Any]]  # integer arrays of NumPy or JAX


@dataclasses.dataclass(frozen=True, eq=False)
class TileSchedule:
    """Live tiles of a `T x S` score matrix cut into `tile_q x tile_k` tiles (the last ones may be short).

    Attributes:
      tile_q, tile_k: tile sizes.
      q_to_k: for each query tile the ascending int32 indices of the key tiles it visits.
      k_to_q: the transpose: for each key tile the ascending query tiles that visit it (for dK and dV).
      is_partial: bool `[query tiles, key tiles]`; True where a live tile needs the predicate. Key indices at or
        beyond S count as masked, query indices at or beyond T do not count, so False means "no masking at all".
    """

    tile_q: int
    tile_k: int
    q_to_k: tuple[np.ndarray, ...]
    k_to_q: tuple[np.ndarray, ...]
    is_partial: np.ndarray

    @property
    def num_live(self) -> int:
        return sum(len(tiles) for tiles in self.q_to_k)

    @property
    def num_partial(self) -> int:
        return int(self.is_partial.sum())


@dataclasses.dataclass(frozen=True)
class Mask:
    """Base of all masks; which (query, key) pairs may attend, by index in the sequence."""

    def allowed(self, q_index: Any, k_index: Any) -> Any:
        """Bool array over broadcastable integer arrays of NumPy or JAX: may query `q_index` see `k_index`?"""
        raise NotImplementedError(f"{type(self).__name__} does not define allowed()")

    def key_intervals(self, q_index: Any, num_keys: int) -> Intervals:
        """The keys of each query as disjoint half-open ranges `[start, stop)`, arrays shaped like `q_index`.

        Says the same as `allowed` in a form whose cost does not grow with T x S. Ranges may be empty
        (`stop <= start`) and may leave `[0, num_keys)`: the caller clips. Works on NumPy and JAX arrays, also inside
        a kernel: hence the array's own namespace.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define key_intervals()")

    def query_offset(self, num_queries: int, num_keys: int) -> int:
        """Sequence index of query 0; the key indices start at 0. Bottom-right aligned unless overridden."""
        return num_keys - num_queries

    def check(self, num_queries: int, num_keys: int) -> None:
        """Raises ValueError when the mask does not fit `num_queries x num_keys`."""

    def dense(self, num_queries: int, num_keys: int) -> np.ndarray:
        """The mask as a bool array `[T, S]`. For tests and pictures: it grows with T x S."""
        self.check(num_queries, num_keys)
        q_index = np.arange(num_queries)[:, None] + self.query_offset(num_queries, num_keys)
        return np.asarray(self.allowed(q_index, np.arange(num_keys)[None, :]), bool)

    def schedule(self, num_queries: int, num_keys: int, tile_q: int, tile_k: int) -> TileSchedule:
        """Live tiles of the `num_queries x num_keys` score matrix; static NumPy, cached."""
        if min(tile_q, tile_k) < 1:
            raise ValueError(f"tile_q and tile_k must be positive; got {tile_q} and {tile_k}")
        self.check(num_queries, num_keys)
        return _schedule(self, num_queries, num_keys, tile_q, tile_k)


@functools.lru_cache(maxsize=256)
def _schedule(mask: Mask, num_queries: int, num_keys: int, tile_q: int, tile_k: int) -> TileSchedule:
    num_q_tiles, num_k_tiles = -(-num_queries // tile_q), -(-num_keys // tile_k)
    k_start = np.arange(num_k_tiles) * tile_k
    live = np.zeros((num_q_tiles, num_k_tiles), bool)
    partial = np.zeros_like(live)
    offset = mask.query_offset(num_queries, num_keys)
    for tile in range(num_q_tiles):
        rows = np.arange(tile * tile_q, min((tile + 1) * tile_q, num_queries))
        visible = np.zeros(num_k_tiles, np.int64)  # allowed pairs in each tile of this tile row
        for start, stop in mask.key_intervals(rows + offset, num_keys):
            start, stop = np.clip(start, 0, num_keys)[:, None], np.clip(stop, 0, num_keys)[:, None]
            overlap = np.minimum(stop, k_start + tile_k) - np.maximum(start, k_start)
            visible += np.maximum(overlap, 0).sum(axis=0)
        live[tile] = visible > 0
        partial[tile] = live[tile] & (visible < len(rows) * tile_k)
    return TileSchedule(
        tile_q=tile_q,
        tile_k=tile_k,
        q_to_k=tuple(np.flatnonzero(row).astype(np.int32) for row in live),
        k_to_q=tuple(np.flatnonzero(column).astype(np.int32) for column in live.T),
        is_partial=partial,
    )


@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    def allowed(self, q_index, k_index):
        return (q_index == q_index) & (k_index == k_index)  # True, in the broadcast shape

    def key_intervals(self, q_index, num_keys):
        xp = q_index.__array_namespace__()
        return [(xp.zeros_like(q_index), xp.full_like(q_index, num_keys))]


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """`k <= q`; with T != S the last query is aligned with the last key (bottom right)."""

    def allowed(self, q_index, k_index):
        return k_index <= q_index

    def key_intervals(self, q_index, num_keys):
        xp = q_index.__array_namespace__()
        return [(xp.zeros_like(q_index), q_index + 1)]


@dataclasses.dataclass(frozen=True)
class SlidingWindow(Mask):
    """Causal, and only the latest `window` keys (the query's own among them) or the first `num_sinks`.

    `window` counts as in Hugging Face's `sliding_window`: query q sees keys `q - window < k <= q`.
    """

    window: int
    num_sinks: int = 0

    def __post_init__(self):
        if self.window < 1:
            raise ValueError(f"window must be at least 1; got {self.window}")
        if self.num_sinks < 0:
            raise ValueError(f"num_sinks must not be negative; got {self.num_sinks}")

    def allowed(self, q_index, k_index):
        return (k_index <= q_index) & ((k_index > q_index - self.window) | (k_index < self.num_sinks))

    def key_intervals(self, q_index, num_keys):
        xp = q_index.__array_namespace__()
        sinks = (xp.zeros_like(q_index), xp.minimum(q_index + 1, self.num_sinks))
        recent = (xp.maximum(q_index - self.window + 1, self.num_sinks), q_index + 1)
        return [sinks, recent]


@dataclasses.dataclass(frozen=True)
class BlockCausal(Mask):
    """Bidirectional inside a block of `block_size` tokens, causal between blocks: `block(k) <= block(q)`."""

    block_size: int

    def __post_init__(self):
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1; got {self.block_size}")

    def allowed(self, q_index, k_index):
        return k_index // self.block_size <= q_index // self.block_size

    def key_intervals(self, q_index, num_keys):
        xp = q_index.__array_namespace__()
        return [(xp.zeros_like(q_index), (q_index // self.block_size + 1) * self.block_size)]


@dataclasses.dataclass(frozen=True)
class BlockDiffusion(Mask):
    """The doubled mask of block-diffusion training over `[noisy ; clean]`, `2 * seq_len` tokens.

    Indices 0..seq_len-1 are the noisy copy, seq_len..2*seq_len-1 the clean one; block(i) = (i mod seq_len) //
    block_size, the last block may be short. Allowed are noisy -> noisy of the same block, noisy -> clean of strictly
    earlier blocks, and clean -> clean block-causally (`clean="block"`) or causally token by token
    (`clean="token"`, which lets the clean half also serve an autoregressive loss).

    Queries are aligned top left: with fewer queries than keys they are the first ones, so the last layer of a model
    may ask for the noisy half only (T = seq_len). Source: Efficient-DLM (arXiv 2512.14067), BD3-LM.
    """

    seq_len: int
    block_size: int
    clean: Literal["block", "token"] = "block"

    def __post_init__(self):
        if self.seq_len < 1:
            raise ValueError(f"seq_len must be at least 1; got {self.seq_len}")
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1; got {self.block_size}")
        if self.clean not in ("block", "token"):
            raise ValueError(f'clean must be "block" or "token"; got {self.clean!r}')

    def query_offset(self, num_queries, num_keys):
        return 0

    def check(self, num_queries, num_keys):
        if num_keys != 2 * self.seq_len or num_queries > num_keys:
            raise ValueError(
                f"BlockDiffusion(seq_len={self.seq_len}) needs 2 * seq_len = {2 * self.seq_len} keys and at most as "
                f"many queries; got {num_keys} keys and {num_queries} queries"
            )

    def allowed(self, q_index, k_index):
        q_clean, k_clean = q_index >= self.seq_len, k_index >= self.seq_len
        q_block = (q_index % self.seq_len) // self.block_size
        k_block = (k_index % self.seq_len) // self.block_size
        same_noisy_block = ~q_clean & ~k_clean & (q_block == k_block)
        earlier_clean_block = ~q_clean & k_clean & (q_block > k_block)
        clean_order = (k_index <= q_index) if self.clean == "token" else (q_block >= k_block)
        return same_noisy_block | earlier_clean_block | (q_clean & k_clean & clean_order)

    def key_intervals(self, q_index, num_keys):
        xp = q_index.__array_namespace__()
        q_clean = q_index >= self.seq_len
        start = (q_index % self.seq_len) // self.block_size * self.block_size  # first token of the query's block
        stop = xp.minimum(start + self.block_size, self.seq_len)
        noisy = (start, xp.where(q_clean, start, stop))
        last_clean = q_index + 1 if self.clean == "token" else self.seq_len + stop
        clean = (xp.full_like(start, self.seq_len), xp.where(q_clean, last_clean, self.seq_len + start))
        return [noisy, clean]


@dataclasses.dataclass(frozen=True)
class PrefixBidirectional(Mask):
    """`k <= prefix_len or q >= prefix_len`: the prefix sees itself and one token more, the rest sees everything."""

    prefix_len: int

    def __post_init__(self):
        if self.prefix_len < 0:
            raise ValueError(f"prefix_len must not be negative; got {self.prefix_len}")

    def allowed(self, q_index, k_index):
        return (k_index <= self.prefix_len) | (q_index >= self.prefix_len)

    def key_intervals(self, q_index, num_keys):
        xp = q_index.__array_namespace__()
        stop = xp.where(q_index >= self.prefix_len, num_keys, self.prefix_len + 1)
        return [(xp.zeros_like(q_index), stop)]
