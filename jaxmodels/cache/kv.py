"""Key/value caches with fixed shapes: one that grows, and one of sinks plus a ring.

A forward pass reads a cache and returns the keys and values of its own tokens; `append` is the only write,
a pure function of its own. Jitted with the cache donated it works in place, and no loop over layers ever
carries a cache. Layer axis first, so that a kernel takes the whole stack and a layer index.

Letters beside those of the models: C blocks, W taps of the key convolution.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.masks import Mask
from pallas_kernels.moba import CentroidCache, append_centroids, init_centroids, moba_attention, moba_decode
from pallas_kernels.quantized_matmul.rounding import SMALLEST, to_codes

Codes = Literal["int8", "fp8"]
"""How a cache may round keys and values: int8 with a scale per token and head, or float8_e4m3fn with one per layer."""
_DTYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


class KV(NamedTuple):
    """Keys (convolved and rotated) and values of T tokens in all layers."""

    k: Float[Array, "L B T K H"]
    v: Float[Array, "L B T K H"]
    raw_k: Float[Array, "L B T K H"] | None = None  # before convolution, of all layers if any has one; else None


@runtime_checkable
class Shape(Protocol):
    """Any model configuration with these fields."""

    @property
    def layers(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def moba_block_size(self) -> int | None: ...
    @property
    def key_conv_taps(self) -> int | None: ...


def _check(cache: "KVCache | SinkRingCache", config: Shape, batch: int) -> None:
    layers, rows, _, kv_heads, head_dim = cache.k.shape
    if (layers, kv_heads, head_dim) != (config.layers, config.kv_heads, config.head_dim):
        raise ValueError(
            f"the cache is for {layers} layers with {kv_heads} kv heads of {head_dim}; the model has "
            f"{config.layers} layers with {config.kv_heads} kv heads of {config.head_dim}"
        )
    if rows != batch:
        raise ValueError(f"the cache holds {rows} rows; got a batch of {batch}")


def _check_ring(config: Shape) -> None:
    """Raises NotImplementedError for models whose layers need more of the past than a ring holds."""
    for what, value in (
        ("that select blocks", config.moba_block_size),
        ("with a key convolution", config.key_conv_taps),
    ):
        if value is not None:
            raise NotImplementedError(f"a ring forgets what layers {what} need; use a KVCache")


def _check_chunk(cache: "KVCache | SinkRingCache", kv: KV, limit: int, what: str, rows: Any = None) -> None:
    layers, batch, _, kv_heads, head_dim = cache.k.shape
    expected = (layers, batch if rows is None else len(rows), kv.k.shape[2], kv_heads, head_dim)
    if kv.k.shape != expected or kv.v.shape != expected:
        raise ValueError(f"kv must have the shape {expected} of this cache; got k {kv.k.shape} and v {kv.v.shape}")
    if kv.k.shape[2] > limit:
        raise ValueError(f"a chunk of {kv.k.shape[2]} tokens does not fit into {limit} {what}")


class Scales(NamedTuple):
    """What codes of keys and of values are multiplied with, per layer: float32 `[L]`."""

    k: Any
    v: Any


class KVCodes(NamedTuple):
    """Keys and values in eight bits. They are rounded once, when they are appended.

    "int8" finds a scale for each token and head, float16. "fp8" takes one per layer, beyond 448 times which values
    saturate.
    """

    format: Codes
    scales: Scales | None = None  # of "fp8"; None: 1

    def check(self, layers: int) -> None:
        """Raises ValueError for another format, and for scales that it has not."""
        if self.format not in get_args(Codes):
            raise ValueError(f"the codes of a cache are 'int8' or 'fp8'; got {self.format!r}")
        if self.scales is not None and self.format != "fp8":
            raise ValueError(f"scales per layer are for fp8 codes; got {self.format!r}")
        for scale in self.scales or ():
            if jnp.shape(scale) != (layers,):
                raise ValueError(f"scales must have shape ({layers},), one per layer; got {jnp.shape(scale)}")


def _buffers(config: Shape, batch: int, capacity: int, dtype: Any, codes: KVCodes | None) -> dict[str, Any]:
    """Empty buffers for keys and values, and their scales."""
    if batch < 1 or capacity < 1:
        raise ValueError(f"batch and capacity must be at least 1; got {batch} and {capacity}")
    shape = (config.layers, batch, capacity, config.kv_heads, config.head_dim)
    if codes is None:
        return {name: jnp.zeros(shape, dtype) for name in ("k", "v")}
    codes.check(config.layers)
    buffers: dict[str, Any] = {name: jnp.zeros(shape, _DTYPES[codes.format]) for name in ("k", "v")}
    for name in ("k", "v"):  # each its own array: a donated state must not hold one twice
        if codes.format == "int8":
            scale = jnp.ones((config.layers, batch, config.kv_heads, capacity), jnp.float16)
        elif codes.scales is None:
            scale = jnp.ones(config.layers)
        else:
            scale = jnp.array(getattr(codes.scales, name), jnp.float32)
        buffers[f"{name}_scale"] = scale
    return buffers


def _extras(config: Shape, batch: int, capacity: int, dtype: Any) -> dict[str, Any]:
    """What an empty cache has beside keys and values: means of blocks, latest raw keys; nothing for most models."""
    extras: dict[str, Any] = {}
    heads, block_size = (config.kv_heads, config.head_dim), config.moba_block_size
    if block_size is not None:
        one = init_centroids(batch, capacity, *heads, block_size=block_size, dtype=dtype)
        for name in ("centroids", "open_sum"):
            leaf = getattr(one, name)
            extras[name] = jnp.zeros((config.layers, *leaf.shape), leaf.dtype)
        extras["block_size"] = block_size
    if config.key_conv_taps is not None:
        extras["raw_k"] = jnp.zeros((config.layers, batch, config.key_conv_taps - 1, *heads), dtype)
    return extras


def _encode(values: Array, like: Array, scale: Array | None) -> tuple[Array, Array | None]:
    """`values [L, B, T, K, H]` as a cache like `like` stores them, and new scales `[L, B, T, K]` if it keeps these."""
    if scale is None:
        return values, None
    exact = values.astype(jnp.float32)
    if scale.ndim == 1:
        return to_codes(
            exact, "fp8" if like.dtype == jnp.float8_e4m3fn else "int8", scale[:, None, None, None, None]
        ), None
    own = jnp.maximum(jnp.abs(exact).max(axis=-1) / 127, SMALLEST)
    # Rounded up in float16, or the largest would saturate; below its range the scale is its smallest number.
    half = own.astype(jnp.float16)
    half = jnp.where(half.astype(jnp.float32) < own, jnp.nextafter(half, jnp.float16(jnp.inf)), half)
    return to_codes(exact, "int8", half.astype(jnp.float32)[..., None]), half


def _written(
    cache: "KVCache | SinkRingCache", kv: KV, slots: Int[Array, "B T"], rows: Int[Array, " B"] | None
) -> dict[str, Array]:
    """The buffers after `kv` is put into `slots` of `rows`."""
    changed = {}
    for name, values in (("k", kv.k), ("v", kv.v)):
        buffer, scale = getattr(cache, name), getattr(cache, f"{name}_scale")
        codes, own = _encode(values, buffer, scale)
        changed[name] = _put(buffer, codes, slots, rows)
        if own is not None:
            chosen = jnp.arange(slots.shape[0]) if rows is None else rows
            # [L, B, K, S]: the two indexed axes come first in what is written.
            changed[f"{name}_scale"] = scale.at[:, chosen[:, None], :, slots].set(
                own.transpose(1, 2, 0, 3), mode="drop", unique_indices=rows is None
            )
    return changed


def _extended(
    cache: "KVCache", kv: KV, lengths: Int[Array, " P"], count: Int[Array, " P"], rows: Int[Array, " P"] | None
) -> dict[str, Array]:
    """Means of blocks and latest raw keys when `count` tokens of `kv` follow `lengths` tokens of `rows`.

    Only what `lengths` says is read of the old ones: so shorter lengths are all that forgetting a row takes.
    """

    def of_rows(leaf: Array) -> Array:
        return leaf if rows is None else leaf.at[:, rows].get(mode="clip")

    changed: dict[str, Array] = {}
    if (size := cache.block_size) is not None:
        is_open = (lengths % size > 0)[:, None, None]

        def append(centroids: Array, open_sum: Array, k: Array) -> CentroidCache:
            before = CentroidCache(centroids, jnp.where(is_open, open_sum, 0), lengths)
            return append_centroids(before, k.astype(centroids.dtype), block_size=size, new_lengths=count)

        after = jax.vmap(append)(of_rows(cache.centroids), of_rows(cache.open_sum), kv.k)
        changed |= {"centroids": after.centroids, "open_sum": after.open_sum}
    if cache.raw_k is not None:
        if kv.raw_k is None:
            raise ValueError("kv must hold raw keys for the key convolution of this cache; got raw_k=None")
        latest = _held(of_rows(cache.raw_k), lengths)
        keys = jnp.concatenate([latest, kv.raw_k.astype(latest.dtype)], axis=2)
        take = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=latest.shape[2], axis=1)
        changed["raw_k"] = jax.vmap(take, in_axes=(1, 0), out_axes=1)(keys, count)
    if rows is None:
        return changed
    return {name: getattr(cache, name).at[:, rows].set(leaf, mode="drop") for name, leaf in changed.items()}


def _held(raw_k: Float[Array, "L B W_minus_1 K H"], lengths: Int[Array, " B"]) -> Array:
    """Latest raw keys of rows with these lengths, oldest first, 0 before the first token."""
    position = lengths[:, None] - raw_k.shape[2] + jnp.arange(raw_k.shape[2])
    return jnp.where((position >= 0)[..., None, None], raw_k, 0)


def _layer_of(cache: "KVCache | SinkRingCache", layer: int | Array, rows: Int[Array, " P"]) -> dict[str, Array]:
    """Some rows of one layer of the buffers, as a cache of one layer."""
    own = {"k": cache.k[layer, rows][None], "v": cache.v[layer, rows][None]}
    for name in ("centroids", "open_sum", "raw_k"):
        if (leaf := getattr(cache, name, None)) is not None:
            own[name] = leaf[layer, rows][None]
    for name in ("k_scale", "v_scale"):
        if (scale := getattr(cache, name)) is not None:
            own[name] = scale[layer][None] if scale.ndim == 1 else scale[layer, rows][None]
    return own


def _put(buffer: Array, new: Array, slots: Int[Array, "B T"], rows: Int[Array, " B"] | None) -> Array:
    """`buffer[:, rows[b], slots[b, t]] = new[:, b, t]`; what lies beyond the rows or the capacity is dropped."""
    unique = rows is None  # several rows may be filler, with the same index beyond the batch
    rows = jnp.arange(slots.shape[0]) if rows is None else rows
    return buffer.at[:, rows[:, None], slots].set(new.astype(buffer.dtype), mode="drop", unique_indices=unique)


def _valid(time: int, count: Int[Array, " B"] | None, batch: int) -> tuple[Array, Array]:
    """Count per row, and which tokens of the chunk `[B, T]` are to be written."""
    if count is None:
        count = jnp.full((batch,), time, jnp.int32)
    return count.astype(jnp.int32), jnp.arange(time) < count[:, None]


def _lengths(lengths: Int[Array, " B"], rows: Int[Array, " P"] | None) -> Int[Array, " P"]:
    """Lengths of some rows, 0 for indices beyond the batch."""
    return lengths if rows is None else lengths.at[rows].get(mode="fill", fill_value=0)


def _grown(lengths: Int[Array, " B"], count: Int[Array, " P"], rows: Int[Array, " P"] | None) -> Int[Array, " B"]:
    return lengths + count if rows is None else lengths.at[rows].add(count, mode="drop")


class KVCache(flax.struct.PyTreeNode):
    """Keeps every token; slot = position.

    Attributes:
      k, v: keys and values, `[L, B, S, K, H]` with S = capacity; slots at or beyond a row's length hold
        garbage.
      k_scale, v_scale: of codes: float32 `[L]`, or float16 `[L, B, K, S]`, one per token and head; else None.
      lengths: tokens each row has been given. Appending past the capacity drops the tokens that do not fit
        while the length keeps counting, so `remaining()` < 0 shows it afterwards; drivers check it
        beforehand.
      centroids, open_sum: for models that select blocks the mean keys `[L, B, C, K, H]` of complete blocks, and the
        sum `[L, B, K, H]` over the block that is not; of all layers, as `CentroidCache` has them of one. Else None.
      raw_k: for models with a key convolution the latest W - 1 keys before it, `[L, B, W - 1, K, H]`. Else None.
      block_size: keys of a block, static.
    """

    k: Any  # float or codes [L, B, S, K, H]; no checked annotations: the class also holds shapes, shardings, donations
    v: Any  # float or codes [L, B, S, K, H]
    lengths: Any  # int32 [B]
    k_scale: Any = None
    v_scale: Any = None
    centroids: Any = None
    open_sum: Any = None
    raw_k: Any = None
    block_size: int | None = flax.struct.field(pytree_node=False, default=None)

    @classmethod
    def init(
        cls,
        config: Shape,
        *,
        batch: int,
        capacity: int,
        dtype: Any,
        codes: KVCodes | None = None,
    ) -> "KVCache":
        """An empty cache for the layers of `config`.

        Keys and values are kept in `dtype`, or as `codes`, which layers that select blocks cannot read.
        """
        if codes is not None and config.moba_block_size is not None:
            raise NotImplementedError(
                f"layers that select blocks (moba) read keys and values as they are; got codes {codes.format!r}"
            )
        buffers = _buffers(config, batch, capacity, dtype, codes)
        return cls(**buffers, **_extras(config, batch, capacity, dtype), lengths=jnp.zeros((batch,), jnp.int32))

    @property
    def capacity(self) -> int:
        return self.k.shape[2]

    def remaining(self) -> Int[Array, " B"]:
        """Free slots per row; negative after an overflow."""
        return self.capacity - self.lengths

    def next_positions(self, time: int) -> Int[Array, "B T"]:
        """Positions of the next `time` tokens of each row."""
        return self.lengths[:, None] + jnp.arange(time, dtype=jnp.int32)

    def check(self, config: Shape, batch: int) -> None:
        """Raises ValueError when the cache does not fit the model or the batch."""
        _check(self, config, batch)
        taps = None if self.raw_k is None else self.raw_k.shape[2] + 1
        for what, own, wanted in (
            ("the means of blocks of a size", self.block_size, config.moba_block_size),
            ("the raw keys for a number of taps", taps, config.key_conv_taps),
        ):
            if own != wanted:
                raise ValueError(f"the cache holds {what}: {own}; the model has {wanted}")

    def append(self, kv: KV, count: Int[Array, " P"] | None = None, rows: Int[Array, " P"] | None = None) -> "KVCache":
        """The cache after `count[p]` more tokens in row `rows[p]` (the first of its T; None: all T).

        rows None: all rows in order; an index beyond the batch writes nothing.
        """
        _check_chunk(self, kv, self.capacity, "cache slots (the capacity)", rows)
        time = kv.k.shape[2]
        count, valid = _valid(time, count, kv.k.shape[1])
        lengths = _lengths(self.lengths, rows)
        return self.replace(
            **_written(self, kv, self._slots(lengths, valid), rows),
            **_extended(self, kv, lengths, count, rows),
            lengths=_grown(self.lengths, count, rows),
        )

    def _slots(self, lengths: Int[Array, " B"], valid: Bool[Array, "B T"]) -> Int[Array, "B T"]:
        """Where the tokens after `lengths` go; padding to distinct slots past the end, where it is dropped."""
        positions = lengths[:, None] + jnp.arange(valid.shape[1], dtype=jnp.int32)
        return jnp.where(valid, positions, self.capacity + positions)

    def fill(self, kv: KV, count: Int[Array, " P"], rows: Int[Array, " P"]) -> "KVCache":
        """Rows `rows` hold only the first `count` of these tokens; an index beyond the batch writes nothing."""
        time = kv.k.shape[2]
        if self.capacity < time:
            raise ValueError(f"a prompt padded to {time} tokens does not fit the cache capacity {self.capacity}")

        changed = {}  # what stands beyond a row's length is never read
        for name, values in (("k", kv.k), ("v", kv.v)):
            buffer, scale = getattr(self, name), getattr(self, f"{name}_scale")
            codes, own = _encode(values, buffer, scale)
            changed[name] = buffer.at[:, rows, :time].set(codes.astype(buffer.dtype), mode="drop")
            if own is not None:
                changed[f"{name}_scale"] = scale.at[:, rows, :, :time].set(jnp.swapaxes(own, 2, 3), mode="drop")
        count = count.astype(jnp.int32)
        changed |= _extended(self, kv, jnp.zeros_like(count), count, rows)
        return self.replace(**changed, lengths=self.lengths.at[rows].set(count, mode="drop"))

    def restart(self, rows: Int[Array, " P"]) -> "KVCache":
        """Rows `rows` are empty; indices beyond the batch are ignored."""
        return self.replace(lengths=self.lengths.at[rows].set(0, mode="drop"))

    def one_layer(self, layer: int | Array, rows: Int[Array, " P"]) -> "KVCache":
        """A copy of some rows of one layer."""
        return self.replace(**_layer_of(self, layer, rows), lengths=_lengths(self.lengths, rows))

    def attend(
        self,
        q: Float[Array, "B T N H"],
        own_k: Float[Array, "B T K H"],
        own_v: Float[Array, "B T K H"],
        *,
        layer: int | Array,
        own_mask: Mask,
        own_lengths: Int[Array, " B"] | None = None,
        window: int | None = None,
        q_positions: Int[Array, "B T"] | None = None,
        skip: Mapping[str, Any] | None = None,
    ) -> Any:
        """Queries against this layer's cached keys and their own: see `decode_attention`.

        `skip` holds its arguments about skipped tiles; with `return_stats` among them the result is a pair.
        """
        return decode_attention(
            q,
            self.k,
            self.v,
            layer=layer,
            k_scale=self.k_scale,
            v_scale=self.v_scale,
            kv_lengths=self.lengths,
            q_positions=q_positions,
            own_k=own_k,
            own_v=own_v,
            own_mask=own_mask,
            own_lengths=own_lengths,
            window=window,
            **(skip or {}),
        )

    def attend_blocks(
        self,
        q: Float[Array, "B T N H"],
        own_k: Float[Array, "B T K H"],
        own_v: Float[Array, "B T K H"],
        *,
        layer: int | Array,
        top_k: int,
        own_lengths: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B T N H"]:
        """Queries against the blocks that they select among this layer's cached keys and their own, causally.

        One token reads all means, but keys and values of `top_k` blocks only: `moba_decode`. More tokens are
        `moba_attention` over all slots: they copy the layer's keys and values, to have their own behind them, and
        compute all means anew.
        """
        assert self.block_size is not None
        options: dict[str, Any] = {"block_size": self.block_size, "top_k": top_k}
        if q.shape[1] == 1:
            means = CentroidCache(self.centroids[layer], self.open_sum[layer], self.lengths)
            return moba_decode(q, self.k, self.v, own_k, own_v, means, layer=layer, **options)  # type: ignore[return-value]
        count, valid = _valid(q.shape[1], own_lengths, len(q))
        slots = self._slots(self.lengths, valid)
        k, v = (
            _put(cached[layer][None], own[None], slots, None)[0] for cached, own in ((self.k, own_k), (self.v, own_v))
        )
        held = jnp.arange(self.capacity) < (self.lengths + count)[:, None]
        segments = (jnp.where(valid, 0, -1), jnp.where(held, 0, -1))
        return moba_attention(q, k, v, segment_ids=segments, **options)

    def latest_raw_keys(self, layer: int | Array) -> Float[Array, "B W_minus_1 K H"]:
        """What the key convolution of a layer needs of the tokens before: `key_conv`'s state."""
        return _held(self.raw_k[layer][None], self.lengths)[0]


class SinkRingCache(flax.struct.PyTreeNode):
    """Keeps the first `num_sinks` tokens and, in a ring, the latest ones: endless streams in fixed memory.

    A query at position p sees the sinks and the keys p - ring < k <= p, in chunks of any size: the
    mask `SlidingWindow(ring, num_sinks)`. A layer with a smaller window of its own keeps to it, without sinks.

    Attributes:
      k, v: keys (rotated at absolute positions) and values `[L, B, S, K, H]`; slots 0..num_sinks-1 are the
        sinks.
      k_scale, v_scale: as in `KVCache`.
      positions: the position held by each slot, -1 = empty.
      lengths: tokens each row has been given.
      num_sinks: static.
    """

    k: Any  # float or codes [L, B, S, K, H]
    v: Any  # float or codes [L, B, S, K, H]
    positions: Any  # int32 [B, S]
    lengths: Any  # int32 [B]
    num_sinks: int = flax.struct.field(pytree_node=False)
    k_scale: Any = None
    v_scale: Any = None

    @classmethod
    def init(
        cls,
        config: Shape,
        *,
        batch: int,
        capacity: int,
        dtype: Any,
        num_sinks: int = 4,
        codes: KVCodes | None = None,
    ) -> "SinkRingCache":
        """An empty cache of `capacity` slots, `num_sinks` of them sinks, the rest the ring. Codes as in `KVCache`."""
        if not 0 <= num_sinks < capacity:
            raise ValueError(f"num_sinks must lie in [0, capacity={capacity}); got {num_sinks}")
        _check_ring(config)
        return cls(
            **_buffers(config, batch, capacity, dtype, codes),
            positions=jnp.full((batch, capacity), -1, jnp.int32),
            lengths=jnp.zeros((batch,), jnp.int32),
            num_sinks=num_sinks,
        )

    @property
    def capacity(self) -> int:
        return self.k.shape[2]

    @property
    def ring(self) -> int:
        """Slots of the ring, which is also the window of every query."""
        return self.capacity - self.num_sinks

    def remaining(self) -> Int[Array, " B"]:
        """Tokens that one `append` takes: always the whole ring."""
        return jnp.full_like(self.lengths, self.ring)

    def next_positions(self, time: int) -> Int[Array, "B T"]:
        """Positions of the next `time` tokens of each row."""
        return self.lengths[:, None] + jnp.arange(time, dtype=jnp.int32)

    def check(self, config: Shape, batch: int) -> None:
        """Raises ValueError when the cache does not fit the model or the batch."""
        _check(self, config, batch)
        _check_ring(config)

    def append(
        self, kv: KV, count: Int[Array, " P"] | None = None, rows: Int[Array, " P"] | None = None
    ) -> "SinkRingCache":
        """The cache after `count[p]` more tokens in row `rows[p]` (the first of its T; None: all T).

        rows None: all rows in order; an index beyond the batch writes nothing.
        """
        _check_chunk(self, kv, self.ring, "ring slots", rows)
        time = kv.k.shape[2]
        count, valid = _valid(time, count, kv.k.shape[1])
        positions = _lengths(self.lengths, rows)[:, None] + jnp.arange(time, dtype=jnp.int32)
        ring_slots = self.num_sinks + (positions - self.num_sinks) % self.ring
        slots = jnp.where(positions < self.num_sinks, positions, ring_slots)
        # Padding goes to distinct slots past the end, where it is dropped.
        slots = jnp.where(valid, slots, self.capacity + jnp.arange(time))
        own = (jnp.arange(slots.shape[0]) if rows is None else rows)[:, None]
        return self.replace(
            **_written(self, kv, slots, rows),
            positions=self.positions.at[own, slots].set(positions, mode="drop", unique_indices=rows is None),
            lengths=_grown(self.lengths, count, rows),
        )

    def fill(self, kv: KV, count: Int[Array, " P"], rows: Int[Array, " P"]) -> "SinkRingCache":
        """Rows `rows` hold only the first `count` of these tokens; an index beyond the batch writes nothing."""
        return self.restart(rows).append(kv, count, rows)

    def restart(self, rows: Int[Array, " P"]) -> "SinkRingCache":
        """Rows `rows` are empty; indices beyond the batch are ignored."""
        return self.replace(
            positions=self.positions.at[rows].set(-1, mode="drop"), lengths=self.lengths.at[rows].set(0, mode="drop")
        )

    def one_layer(self, layer: int | Array, rows: Int[Array, " P"]) -> "SinkRingCache":
        """A copy of some rows of one layer."""
        return self.replace(
            **_layer_of(self, layer, rows),
            positions=self.positions[rows],
            lengths=_lengths(self.lengths, rows),
        )

    def attend(
        self,
        q: Float[Array, "B T N H"],
        own_k: Float[Array, "B T K H"],
        own_v: Float[Array, "B T K H"],
        *,
        layer: int | Array,
        own_mask: Mask,
        own_lengths: Int[Array, " B"] | None = None,
        window: int | None = None,
        q_positions: Int[Array, "B T"] | None = None,
        skip: Mapping[str, Any] | None = None,
    ) -> Float[Array, "B T N H"]:
        """Queries against this layer's sinks and ring and their own keys: see `decode_attention`."""
        if skip:
            raise ValueError(f"tiles are skipped in full attention only, and a ring is a window; got skip={skip}")
        own_window = window is not None and window <= self.ring
        return decode_attention(
            q,
            self.k,
            self.v,
            layer=layer,
            k_scale=self.k_scale,
            v_scale=self.v_scale,
            kv_lengths=self.lengths,  # beyond the capacity once the ring has wrapped: all slots
            k_positions=self.positions,
            q_positions=self.next_positions(q.shape[1]) if q_positions is None else q_positions,
            own_k=own_k,
            own_v=own_v,
            own_mask=own_mask,
            own_lengths=own_lengths,
            window=window if own_window else self.ring,
            num_sinks=0 if own_window else self.num_sinks,
        )


class CacheRows(flax.struct.PyTreeNode):
    """Some rows of a cache, to be read: what the next piece of their prompts sees. Copies one layer at a time.

    Attributes:
      cache: the whole cache.
      rows: int32 [P]; an index beyond the batch reads as an empty row.
    """

    cache: Any  # KVCache | SinkRingCache
    rows: Any  # int32 [P]

    def next_positions(self, time: int) -> Int[Array, "P T"]:
        """Positions of the next `time` tokens of each row."""
        return _lengths(self.cache.lengths, self.rows)[:, None] + jnp.arange(time, dtype=jnp.int32)

    def check(self, config: Shape, batch: int) -> None:
        """Raises ValueError when the cache does not fit the model, or the rows the batch."""
        self.cache.check(config, self.cache.k.shape[1])
        if batch != len(self.rows):
            raise ValueError(f"{len(self.rows)} rows of the cache were chosen; got a batch of {batch}")

    def attend(self, q: Float[Array, "P T N H"], own_k: Array, own_v: Array, *, layer: int | Array, **options: Any):
        """See `KVCache.attend`."""
        return self.cache.one_layer(layer, self.rows).attend(q, own_k, own_v, layer=0, **options)

    def attend_blocks(self, q: Array, own_k: Array, own_v: Array, *, layer: int | Array, **options: Any) -> Array:
        """See `KVCache.attend_blocks`."""
        return self.cache.one_layer(layer, self.rows).attend_blocks(q, own_k, own_v, layer=0, **options)

    def latest_raw_keys(self, layer: int | Array) -> Float[Array, "P W_minus_1 K H"]:
        """See `KVCache.latest_raw_keys`."""
        return self.cache.one_layer(layer, self.rows).latest_raw_keys(0)


Cache = KVCache | SinkRingCache | CacheRows
"""Everything `CausalLM.hidden` takes as a cache."""
