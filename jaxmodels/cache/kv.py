"""Key/value caches with fixed shapes: one that grows, and one of sinks plus a ring.

A forward pass reads a cache and returns the keys and values of its own tokens; `append` is the only write,
a pure function of its own. Jitted with the cache donated it works in place, and no loop over layers ever
carries a cache. Layer axis first, so that a kernel takes the whole stack and a layer index.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.masks import Mask
from pallas_kernels.quantized_matmul.rounding import SMALLEST, to_codes

Codes = Literal["int8", "fp8"]
"""How a cache may round keys and values: int8 with a scale per token and head, or float8_e4m3fn with one per layer."""
_DTYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


class KV(NamedTuple):
    """Keys (rotated) and values of T tokens in all layers."""

    k: Float[Array, "L B T K H"]
    v: Float[Array, "L B T K H"]


@runtime_checkable
class Shape(Protocol):
    """Any model configuration with these fields."""

    @property
    def layers(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


def _check(cache: "KVCache | SinkRingCache", config: Shape, batch: int) -> None:
    layers, rows, _, kv_heads, head_dim = cache.k.shape
    if (layers, kv_heads, head_dim) != (config.layers, config.kv_heads, config.head_dim):
        raise ValueError(
            f"the cache is for {layers} layers with {kv_heads} kv heads of {head_dim}; the model has "
            f"{config.layers} layers with {config.kv_heads} kv heads of {config.head_dim}"
        )
    if rows != batch:
        raise ValueError(f"the cache holds {rows} rows; got a batch of {batch}")


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


def _layer_of(cache: "KVCache | SinkRingCache", layer: int | Array, rows: Int[Array, " P"]) -> dict[str, Array]:
    """Some rows of one layer of the buffers, as a cache of one layer."""
    own = {"k": cache.k[layer, rows][None], "v": cache.v[layer, rows][None]}
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
    """

    k: Any  # float or codes [L, B, S, K, H]; no checked annotations: the class also holds shapes, shardings, donations
    v: Any  # float or codes [L, B, S, K, H]
    lengths: Any  # int32 [B]
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
        codes: KVCodes | None = None,
    ) -> "KVCache":
        """An empty cache for `config.layers`, `config.kv_heads` and `config.head_dim`.

        Keys and values are kept in `dtype`, or as `codes`.
        """
        buffers = _buffers(config, batch, capacity, dtype, codes)
        return cls(**buffers, lengths=jnp.zeros((batch,), jnp.int32))

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

    def append(self, kv: KV, count: Int[Array, " P"] | None = None, rows: Int[Array, " P"] | None = None) -> "KVCache":
        """The cache after `count[p]` more tokens in row `rows[p]` (the first of its T; None: all T).

        rows None: all rows in order; an index beyond the batch writes nothing.
        """
        _check_chunk(self, kv, self.capacity, "cache slots (the capacity)", rows)
        time = kv.k.shape[2]
        count, valid = _valid(time, count, kv.k.shape[1])
        positions = _lengths(self.lengths, rows)[:, None] + jnp.arange(time, dtype=jnp.int32)
        # Padding goes to distinct slots past the end, where it is dropped.
        slots = jnp.where(valid, positions, self.capacity + positions)
        return self.replace(**_written(self, kv, slots, rows), lengths=_grown(self.lengths, count, rows))

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
        lengths = self.lengths.at[rows].set(count.astype(jnp.int32), mode="drop")
        return self.replace(**changed, lengths=lengths)

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
        _check(self.cache, config, self.cache.k.shape[1])
        if batch != len(self.rows):
            raise ValueError(f"{len(self.rows)} rows of the cache were chosen; got a batch of {batch}")

    def attend(self, q: Float[Array, "P T N H"], own_k: Array, own_v: Array, *, layer: int | Array, **options: Any):
        """See `KVCache.attend`."""
        return self.cache.one_layer(layer, self.rows).attend(q, own_k, own_v, layer=0, **options)


Cache = KVCache | SinkRingCache | CacheRows
"""Everything `CausalLM.hidden` takes as a cache."""
