"""Qwen2, Qwen2.5, Qwen3 and Qwen3-MoE decoders as pure functions over a plain dict of parameters.

Letters: B batch, T query tokens, S key slots, N query heads, K kv heads, H head dim, D model dim, F mlp dim,
V vocabulary, L layers, W taps. Parameters (layers stacked, axis 0 = layer; output axes before contracted ones, as in
checkpoints):

    embed [V, D]   final_norm [D]   head [V, D] (absent when tied)
    layers:  attention_norm [L, D]   mlp_norm [L, D]
             attention: q [L, N, H, D]   k, v [L, K, H, D]   o [L, D, N, H]
                        q_bias [L, N, H]   k_bias, v_bias [L, K, H]   q_norm, k_norm [L, H]
                        k_conv [L, W, K, H] (tap 0 is the current token; of layers without one 0 and never read)
             mlp: gate, up [L, F, D]   down [L, D, F], of a mixture of E experts
                  router [L, E, D]   gate, up [L, E, F, D]   down [L, E, D, F]
"""

import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxmodels.cache import KV, Cache, SinkRingCache
from jaxmodels.functional import Params, Structure, constant, init_params, weight
from jaxmodels.layers import (
    add_norm,
    apply_rope,
    embed,
    gated_silu,
    linear,
    linears,
    norm_rope,
    rms_norm,
    rope_tables,
)
from jaxmodels.qwen.config import LayerAttention, MobaConfig, QwenConfig
from jaxmodels.qwen.moe import Moe
from jaxmodels.sharding import constrain
from jaxmodels.sparse_attention import SkipAttention, SkipCounts, SkipMeasure
from jaxmodels.sparse_attention.calibration import measure_decode_sparsity, measure_sparsity
from pallas_kernels.attention import flash_attention
from pallas_kernels.attention.limits import Limits
from pallas_kernels.attention.skip import SkipStats
from pallas_kernels.masks import Causal, Mask, SlidingWindow
from pallas_kernels.moba import key_conv, moba_attention
from pallas_kernels.partial import MaybePartial, Partial, made
from pallas_kernels.quantized_matmul import QuantizedTensor, Rows, interleave, is_better_interleaved

log = logging.getLogger(__name__)

_ATTENTION = jax.checkpoint_policies.save_only_these_names("attention")
REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _ATTENTION
    ),
    "attention": _ATTENTION,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What a block keeps for its backward pass, from much memory to much recomputation. "none": everything. "dots":
results of attention and of products with weights. "attention": results of attention. "full": its input only."""


class Hidden(NamedTuple):
    """What a forward pass leaves before the vocabulary projection."""

    states: Float[Array, "B T D"]  # after the final norm
    kv: KV | None  # keys and values of these tokens, [L, B, T, K, H]
    layers: Float[Array, "states B T D"] | None  # embeddings, then the output of each block (before the final norm)
    # Per layer: [L, B, N], with a cache [L, B, K]; dense_guarded [L]; zeros for layers without full attention.
    skip_stats: SkipStats | None = None
    skip_counts: SkipCounts | None = None  # per layer; zeros for layers without full attention


class SkipRequest(NamedTuple):
    """What attention is to skip, and what to count; see `CausalLM.hidden`."""

    skip: SkipAttention | None = None
    stats: bool = False
    measure: SkipMeasure | None = None


class Attend(NamedTuple):
    """What the attention of every block of one forward pass has in common."""

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]
    mask: Mask  # over all tokens without a cache, among the own tokens with one
    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"] | None
    lengths: Int[Array, " B"] | None
    cache: Cache | None
    request: SkipRequest = SkipRequest()

    def __call__(
        self, q: Array, k: Array, v: Array, *, layer: int | Array, attention: LayerAttention
    ) -> tuple[Array, SkipStats | None, SkipCounts | None]:
        """Attention output `[B, T, N, H]` of rotated queries and keys, and what was asked for about skipped tiles.

        `attention` is that of this layer. Only full attention skips tiles.
        """
        skip, stats, measure = self.request
        window = attention.window
        if not attention.full:
            skip = None
        if attention.moba is not None:
            y = self._routed(q, k, v, layer=layer, moba=attention.moba)
            counts = None if measure is None else _nothing_counted(len(q), measure)
            found = _nothing_skipped(q if self.cache is None else k) if stats else None
            return y, found, counts
        if self.cache is not None:
            options = {} if skip is None else skip.for_layer(layer) | ({"return_stats": True} if stats else {})
            y = self.cache.attend(
                q,
                k,
                v,
                layer=layer,
                own_mask=self.mask,
                own_lengths=self.lengths,
                window=window,
                q_positions=self.positions,
                skip=options,
            )
            found = _nothing_skipped(k) if stats and skip is None else None
            y, found = y if isinstance(y, tuple) else (y, found)
            return y, found, None
        mask = self.mask
        if window is not None:
            if mask != Causal():
                raise ValueError(f"a layer with a window ({window}) needs the mask Causal(); got {mask}")
            mask = SlidingWindow(window)
        options = {"mask": mask, "segment_ids": self.segment_ids, "kv_lengths": self.lengths}
        if (skip is not None or measure is not None) and self.lengths is not None:
            options["segment_ids"] = self._real_segments(q.shape[1])
        counts = None
        if measure is not None:
            counts = self._measure(q, k, measure, options) if attention.full else _nothing_counted(len(q), measure)
        if skip is None:
            found = _nothing_skipped(q) if stats else None
            return flash_attention(q, k, v, **options), found, counts  # type: ignore[return-value]
        options |= skip.for_layer(layer, self.lengths)
        if not stats:
            return flash_attention(q, k, v, **options), None, counts  # type: ignore[return-value]
        return *flash_attention(q, k, v, **options, return_stats=True), counts

    def convolve(self, k: Float[Array, "B T K H"], weight: Float[Array, "W K H"], *, layer: int | Array) -> Array:
        """Keys after the convolution of a layer over them and the keys before, none of them of another segment."""
        if self.mask != Causal():
            raise ValueError(f"a layer with a key convolution needs the mask Causal(); got {self.mask}")
        state = None
        if self.cache is not None:
            assert not isinstance(self.cache, SinkRingCache)  # refused by its check
            state = self.cache.latest_raw_keys(layer).astype(k.dtype)
        return key_conv(k, weight.reshape(len(weight), -1), self.segment_ids, state)[0]

    def _routed(self, q: Array, k: Array, v: Array, *, layer: int | Array, moba: MobaConfig) -> Array:
        """Attention to selected blocks."""
        if self.mask != Causal():
            raise ValueError(f"a layer with {moba} needs the mask Causal(); got {self.mask}")
        if self.cache is not None:
            assert not isinstance(self.cache, SinkRingCache)  # refused by its check
            return self.cache.attend_blocks(q, k, v, layer=layer, top_k=moba.top_k, own_lengths=self.lengths)
        segment_ids = self.segment_ids
        if self.lengths is not None:
            segment_ids = self._real_segments(q.shape[1])[0]
        return moba_attention(q, k, v, block_size=moba.block_size, top_k=moba.top_k, segment_ids=segment_ids)

    def _real_segments(self, time: int) -> tuple[Array, Array]:
        """Segments of queries and keys in which padding sees nothing: it must neither vote on tiles nor be counted."""
        assert self.lengths is not None
        keys = jnp.zeros((len(self.lengths), time), jnp.int32) if self.segment_ids is None else self.segment_ids
        return jnp.where(jnp.arange(time) < self.lengths[:, None], keys, -1), keys

    def _measure(self, q: Array, k: Array, measure: SkipMeasure, options: dict[str, Any]) -> SkipCounts:
        batch, time = q.shape[:2]
        segments = options["segment_ids"]
        q_segments, k_segments = segments if isinstance(segments, tuple) else (segments, segments)
        limits = Limits(q_segments=q_segments, k_segments=k_segments, kv_lengths=self.lengths)
        visited, skipped = measure_sparsity(
            q, k, measure.thresholds, measure.prefill, mask=options["mask"], limits=limits
        )
        if measure.decode is None:
            return SkipCounts(visited, skipped, None, None)
        lengths = jnp.full((batch,), time) if self.lengths is None else self.lengths
        decoded = measure_decode_sparsity(
            q, k, measure.thresholds, measure.decode, lengths=lengths, num_tokens=measure.decode_tokens
        )
        return SkipCounts(visited, skipped, *decoded)


def _nothing_skipped(heads: Float[Array, "B T N H"]) -> SkipStats:
    """The counts of a layer that skips nothing, per head."""
    nothing = jnp.zeros((heads.shape[0], heads.shape[2]), jnp.int32)
    return SkipStats(nothing, nothing, jnp.int32(0))


def _nothing_counted(batch: int, measure: SkipMeasure) -> SkipCounts:
    """The counts of a layer that is not measured."""
    visited = jnp.zeros((batch,), jnp.int32)
    skipped = jnp.zeros((batch, measure.thresholds.shape[0]), jnp.int32)
    return SkipCounts(visited, skipped, *((None, None) if measure.decode is None else (visited, skipped)))


class Attention(nnx.Module):
    """Grouped-query attention with optional biases, and per-head norms and a key convolution before the rotation."""

    def __init__(self, config: QwenConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        D, N, K, H = config.dim, config.heads, config.kv_heads, config.head_dim
        self.q = weight(rngs, (N, H, D), ("heads", None, "embed"), dtype)
        self.k = weight(rngs, (K, H, D), ("kv_heads", None, "embed"), dtype)
        self.v = weight(rngs, (K, H, D), ("kv_heads", None, "embed"), dtype)
        self.o = weight(rngs, (D, N, H), ("embed", "heads", None), dtype)
        if config.qkv_bias:
            self.q_bias = constant(0.0, (N, H), ("heads", None), dtype)
            self.k_bias = constant(0.0, (K, H), ("kv_heads", None), dtype)
            self.v_bias = constant(0.0, (K, H), ("kv_heads", None), dtype)
        if config.qk_norm:
            self.q_norm = constant(1.0, (H,), (None,), dtype)
            self.k_norm = constant(1.0, (H,), (None,), dtype)
        if config.key_conv_taps is not None:
            # From 0 on: keys are then what they were without, SiLU has a slope of 1/2, and nothing has to tell apart
            # the layers without a convolution.
            self.k_conv = constant(0.0, (config.key_conv_taps, K, H), (None, "kv_heads", None), dtype)
        self.config = config

    @property
    def readers(self) -> tuple[Any, ...]:
        """Weights that `x` may be turned for."""
        return self.q[...], self.k[...], self.v[...]

    def __call__(
        self, x: Rows, attend: Attend, *, layer: int | Array, attention: LayerAttention
    ) -> tuple[MaybePartial, KV, tuple]:
        equations = ("BTD,NHD->BTNH", "BTD,KHD->BTKH", "BTD,KHD->BTKH")
        in_one_step = self.config.qk_norm and attention.rotary and self.config.key_conv_taps is None
        q, k, v = linears(x, self.readers, equations, merged=self.config.qkv_bias or not in_one_step)
        if self.config.qkv_bias:
            q, k, v = q + self.q_bias[...], k + self.k_bias[...], v + self.v_bias[...]
        raw_k = None
        if in_one_step:
            norms = (self.q_norm[...], self.k_norm[...], None)
            q, k, v = norm_rope((q, k, v), norms, attend.cos, attend.sin, epsilon=self.config.norm_eps)
        else:
            if self.config.qk_norm:
                q = rms_norm(q, self.q_norm[...], self.config.norm_eps)
                k = rms_norm(k, self.k_norm[...], self.config.norm_eps)
            if self.config.key_conv_taps is not None:
                raw_k = k
            if attention.key_conv is not None:
                k = attend.convolve(k, self.k_conv[...], layer=layer)
            if attention.rotary:
                q, k = apply_rope(q, attend.cos, attend.sin), apply_rope(k, attend.cos, attend.sin)
        y, *about = attend(q, k, v, layer=layer, attention=attention)
        return linear(y, self.o[...], "BTNH,DNH->BTD", merged=False), KV(k, v, raw_k), tuple(about)


class Mlp(nnx.Module):
    """SwiGLU."""

    def __init__(self, config: QwenConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        D, F = config.dim, config.mlp_dim
        self.gate = weight(rngs, (F, D), ("mlp", "embed"), dtype)
        self.up = weight(rngs, (F, D), ("mlp", "embed"), dtype)
        self.down = weight(rngs, (D, F), ("embed", "mlp"), dtype)

    @property
    def readers(self) -> tuple[Any, ...]:
        """Weights that `x` may be turned for."""
        return self.gate[...], self.up[...]

    def __call__(self, x: Rows) -> MaybePartial:
        gate, up = linears(x, self.readers, ("BTD,FD->BTF", "BTD,FD->BTF"), merged=False)
        gated = gated_silu(gate, up, readers=(self.down[...],))
        return linear(gated, self.down[...], "BTF,DF->BTD", merged=False)


class Stream(NamedTuple):
    """The residual stream `x + y` between blocks; parts of a sum wait for the norm that reads it."""

    x: Float[Array, "B T D"]
    y: Partial | None = None

    @classmethod
    def of(cls, x: Array, y: MaybePartial) -> "Stream":
        stream = cls(x, y)
        return stream if isinstance(y, Partial) else cls(stream.made())

    def made(self) -> Float[Array, "B T D"]:
        """As an array."""
        return self.x if self.y is None else constrain(self.x + made(self.y), ("batch", None, None))


class Block(nnx.Module):
    """One decoder layer."""

    def __init__(self, config: QwenConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.attention_norm = constant(1.0, (config.dim,), ("embed",), dtype)
        self.attention = Attention(config, rngs=rngs, dtype=dtype)
        self.mlp_norm = constant(1.0, (config.dim,), ("embed",), dtype)
        self.mlp = (Mlp if config.moe is None else Moe)(config, rngs=rngs, dtype=dtype)
        self.norm_eps = config.norm_eps

    def __call__(
        self, x: Stream, attend: Attend, *, layer: int | Array, attention: LayerAttention
    ) -> tuple[Stream, KV, tuple]:
        with jax.named_scope("attention"):
            rest, normed = add_norm(*x, self.attention_norm[...], self.norm_eps, readers=self.attention.readers)
            y, kv, about = self.attention(normed, attend, layer=layer, attention=attention)
        with jax.named_scope("mlp"):
            rest, normed = add_norm(rest, y, self.mlp_norm[...], self.norm_eps, readers=self.mlp.readers)
            return Stream.of(rest, self.mlp(normed)), kv, about


class Ends(nnx.Module):
    """What is not stacked: embedding, final norm, and the head unless it is tied."""

    def __init__(self, config: QwenConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.embed = weight(rngs, (config.vocab_size, config.dim), ("vocab", "embed"), dtype)
        self.final_norm = constant(1.0, (config.dim,), ("embed",), dtype)
        if not config.tied_head:
            self.head = weight(rngs, (config.vocab_size, config.dim), ("vocab", "embed"), dtype)


@functools.lru_cache(maxsize=32)
def _structure(part: Callable[..., nnx.Module], config: QwenConfig) -> Structure:
    return Structure.of(lambda rngs, dtype: part(config, rngs=rngs, dtype=dtype))


class Run(NamedTuple):
    """`repeats` passes over a pattern of layers, described one by one."""

    start: int
    repeats: int
    pattern: tuple[LayerAttention, ...]


def layer_runs(attention: tuple[LayerAttention, ...]) -> list[Run]:
    """Layers as scans: the stack as repeats of its shortest pattern, else runs of equal layers."""
    layers = len(attention)
    for period in range(1, layers // 2 + 1):
        if layers % period == 0 and attention == attention[:period] * (layers // period):
            return [Run(0, layers // period, attention[:period])]
    edges = [0, *(i for i in range(1, layers) if attention[i] != attention[i - 1]), layers]
    return [Run(start, stop - start, (attention[start],)) for start, stop in itertools.pairwise(edges)]


@dataclasses.dataclass(frozen=True)
class CausalLM:
    """Pure functions of one configuration; hashable, so it can be a static argument.

    Everything computes in the dtype of the parameters, except norms, softmax, rotation and logits: float32.
    """

    config: QwenConfig

    def init(self, key: Array, dtype: Any = jnp.float32) -> Params:
        """Random parameters: weights from N(0, 0.02²), norms 1, biases and taps 0. Jit it to place shards directly."""
        ends_key, layers_key = jax.random.split(key)
        make = lambda part: lambda rngs, dtype: part(self.config, rngs=rngs, dtype=dtype)  # noqa: E731
        params = init_params(make(Ends), ends_key, jnp.dtype(dtype))
        keys = jax.random.split(layers_key, self.config.layers)
        params["layers"] = jax.vmap(lambda key: init_params(make(Block), key, jnp.dtype(dtype)))(keys)
        return params

    @property
    def linears(self) -> dict[tuple[str, ...], int]:
        """Paths of the weights of the blocks' linears, and how many of their last axes are contracted."""
        paths: dict[tuple[str, ...], int] = {("layers", "attention", name): 1 for name in ("q", "k", "v")}
        paths[("layers", "attention", "o")] = 2
        return paths | {("layers", "mlp", name): 1 for name in ("gate", "up", "down")}

    @property
    def expert_linears(self) -> frozenset[tuple[str, ...]]:
        """Those of the linears that are stacked by layer and by expert, `[L, E, ...]`."""
        return frozenset() if self.config.moe is None else frozenset(p for p in self.linears if p[1] == "mlp")

    @property
    def logical_axes(self) -> dict[str, Any]:
        """Nested dict like the parameters; per array a tuple of logical axis names or None."""
        axes = dict(_structure(Ends, self.config).axes)
        axes["layers"] = jax.tree.map(
            lambda names: ("layers", *names),
            _structure(Block, self.config).axes,
            is_leaf=lambda node: isinstance(node, tuple),
        )
        return axes

    def unstack(self, params: Params) -> Params:
        """The same parameters with a tuple of arrays, one per layer, in the place of each stack, for unrolled decoding.

        On a CPU the per-layer arrays are views: nothing is copied, and a compiled step reads weights in
        place, where slices inside the step would be copied (XLA's CPU backend materialises them). Elsewhere
        they are slices. Call it once, outside of jit; training and checkpoints keep the stacked form.
        """
        return params | {"layers": jax.tree.map(_by_layer, params["layers"], is_leaf=_is_quantized)}

    def for_decoding(self, params: Params) -> Params:
        """The parameters in the form that decoding loops read fastest; call it once, outside of jit.

        Where a loop over steps would copy a slice of a stacked weight before it multiplies, which XLA does on CPUs and
        GPUs, they are unstacked. On a GPU quantized weights stay in their stacks, which kernels read in place, with
        codes interleaved for these. Arrays of layers and such codes are copies; where memory has no room for them,
        parameters stay as they are, with a warning.
        """
        layers = params["layers"]
        if not is_stacked(layers):
            return params
        device = jax.tree.leaves(layers)[0].devices().pop()
        if device.platform == "cpu":
            return self.unstack(params)
        memory = device.memory_stats() or {}
        room = memory.get("bytes_limit", math.inf) - memory.get("bytes_in_use", 0)
        dtype = params["final_norm"].dtype

        def bytes_of(leaves: list[Array]) -> int:
            return sum(leaf.addressable_data(0).nbytes for leaf in leaves)

        def moves(leaf: Array | QuantizedTensor) -> bool:
            return isinstance(leaf, QuantizedTensor) and is_better_interleaved(leaf, dtype)

        needed = bytes_of([leaf for leaf in jax.tree.leaves(layers, is_leaf=_is_quantized) if not _is_quantized(leaf)])
        if needed > room:
            log.warning("no room for %.1f GB of weights by layer: decoding copies them in each step", needed / 1e9)
            return params
        codes = bytes_of([leaf.codes for leaf in jax.tree.leaves(params, is_leaf=_is_quantized) if moves(leaf)])
        if not (has_room := codes <= room - needed):
            log.warning("no room for %.1f GB of interleaved codes: each step orders its activations", codes / 1e9)

        # Also vectors of norms are worth it beside quantized weights: a kernel whose argument is a slice becomes a
        # "dynamic slice fusion", which XLA leaves out of CUDA graphs.
        def one(leaf: Array | QuantizedTensor) -> Any:
            if isinstance(leaf, QuantizedTensor):
                return interleave(leaf) if has_room and moves(leaf) else leaf
            return _by_layer(leaf)

        decoding = params | {"layers": jax.tree.map(one, layers, is_leaf=_is_quantized)}
        return decoding | {name: one(leaf) for name, leaf in params.items() if _is_quantized(leaf)}

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        mask: Mask = Causal(),
        segment_ids: Int[Array, "B T"] | None = None,
        lengths: Int[Array, " B"] | None = None,
        skip: SkipAttention | None = None,
    ) -> Float[Array, "B T V"]:
        """The ordinary full forward: float32 logits. With `skip` the attention leaves out tiles, see `hidden`."""
        states = self.hidden(
            params, tokens, positions=positions, mask=mask, segment_ids=segment_ids, lengths=lengths, skip=skip
        ).states
        return self.head(params, states)

    def head(self, params: Params, states: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 logits of hidden states."""
        matrix = params["embed"] if self.config.tied_head else params["head"]
        return linear(states, matrix, "...D,VD->...V", dtype=jnp.dtype(jnp.float32))

    def block(
        self,
        params: Params,
        states: Float[Array, "B T D"],
        *,
        layer: int,
        positions: Int[Array, "B T"] | None = None,
        mask: Mask = Causal(),
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """One decoder block by itself: `hidden` is the embedding, all of these in turn, and the final norm.

        `params` are of this layer alone, `layer` says what it attends to; the rest is as in `hidden`.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(states.shape[1], dtype=jnp.int32), states.shape[:2])
        cos, sin = rope_tables(self.config.rope, self.config.head_dim, positions, None)
        attend = Attend(cos, sin, mask, positions, segment_ids, None, None)
        block = _structure(Block, self.config).module(params)
        return block(Stream(states), attend, layer=layer, attention=self.config.layer_attention[layer])[0].made()

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        mask: Mask = Causal(),
        segment_ids: Int[Array, "B T"] | None = None,
        lengths: Int[Array, " B"] | None = None,
        cache: Cache | None = None,
        own_mask: Mask | None = None,
        return_kv: bool = False,
        layer_states: bool = False,
        skip: SkipAttention | None = None,
        skip_stats: bool = False,
        skip_measure: SkipMeasure | None = None,
        remat: str | None = None,
        unroll: bool | None = None,
    ) -> Hidden:
        """Hidden states after the final norm.

        Without a cache the tokens see each other through `mask` (and `segment_ids`). With one they also see
        what it holds, their own keys and values are returned for `cache.append`, and the cache itself is
        only read.

        Args:
          params: parameters, stacked or from `unstack`.
          tokens: token ids.
          positions: rotary positions; default 0..T-1, with a cache `cache.next_positions(T)`.
          mask: mask over the tokens; without a cache only. Layers with a window, blocks or a key convolution need
            `Causal()`.
          segment_ids: tokens see only their own segment; without a cache only.
          lengths: valid tokens per row, the rest being padding that nobody sees.
          cache: keys and values of earlier tokens.
          own_mask: mask of the tokens among themselves on indices 0..T-1; with a cache only, default
            `Causal()`.
          return_kv: return keys and values also without a cache (for a prefill).
          layer_states: return the embeddings and every block's output.
          skip: leave out tiles of attention without weight (skip-softmax), forward and backward alike; with a cache
            tiles of the cache. Layers with a window or blocks skip nothing.
          skip_stats: return the exact counts of visited and skipped tiles; needs `skip`.
          skip_measure: count what each of many thresholds would skip in this pass; without a cache only.
          remat: name of an entry of REMAT_POLICIES; None means "none".
          unroll: True writes the layers out one after the other, False scans them. None chooses by measurement
            (README): it scans, except with a cache on a GPU. Unstacked parameters are always unrolled.
        """
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise ValueError(f"tokens must be [batch, time] and not empty; got shape {tokens.shape}")
        if remat is not None and remat not in REMAT_POLICIES:
            raise ValueError(f"remat must be None or one of {[*REMAT_POLICIES]}; got {remat!r}")
        batch, time = tokens.shape
        if skip_stats and skip is None:
            raise ValueError("skip_stats counts skipped tiles: give skip")
        if cache is not None and skip_measure is not None:
            raise NotImplementedError("skip_measure counts in passes over all tokens; leave it out with a cache")
        if cache is None:
            if own_mask is not None:
                raise ValueError(f"own_mask={own_mask} needs a cache; use mask without one")
            if positions is None:
                positions = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (batch, time))
        else:
            if mask != Causal() or segment_ids is not None:
                raise ValueError("mask and segment_ids apply without a cache only; use own_mask with one")
            cache.check(self.config, batch)
            mask = Causal() if own_mask is None else own_mask
            if positions is None:
                positions = cache.next_positions(time)
            if unroll is None and is_stacked(params["layers"]):
                unroll = jax.default_backend() == "gpu"
        if positions.shape != tokens.shape:
            raise ValueError(f"positions must have the shape of tokens {tokens.shape}; got {positions.shape}")

        cos, sin = rope_tables(self.config.rope, self.config.head_dim, positions, lengths)
        request = SkipRequest(skip, skip_stats, skip_measure)
        attend = Attend(cos, sin, mask, positions, segment_ids, lengths, cache, request)
        with jax.named_scope("embed"):
            x = embedded = constrain(embed(params["embed"], tokens), ("batch", None, None))
        keep_kv = return_kv or cache is not None
        x, kv, states, about = self._layers(
            params["layers"], x, attend, keep_kv=keep_kv, keep_states=layer_states, remat=remat, unroll=unroll
        )
        if cache is not None:
            # Orders every read of the cache before the append that follows: XLA then needs no copy of the cache.
            x, kv = jax.lax.optimization_barrier((x, kv))
        if states is not None:
            states = jnp.concatenate([embedded[None], states])
        with jax.named_scope("final_norm"):
            return Hidden(rms_norm(x, params["final_norm"], self.config.norm_eps), kv, states, *about)

    def _layers(
        self,
        layers: Params,
        x: Float[Array, "B T D"],
        attend: Attend,
        *,
        keep_kv: bool,
        keep_states: bool,
        remat: str | None,
        unroll: bool | None,
    ) -> tuple[Float[Array, "B T D"], KV | None, Float[Array, "L B T D"] | None, tuple]:
        block = _structure(Block, self.config)

        scanned = is_stacked(layers) and not unroll
        policy = REMAT_POLICIES[remat or "none"]
        # What is carried, or kept for a backward pass, is one array.
        is_one = scanned or policy is not None or keep_states

        def run_block(params: Params, x: Stream, layer: int | Array, attention: LayerAttention) -> tuple[Stream, tuple]:
            x, kv, about = block.module(params)(x, attend, layer=layer, attention=attention)
            if is_one:
                x = Stream(x.made())
            return x, (kv if keep_kv else None, x.x if keep_states else None, about)

        if policy is not None:
            # Inside a scan common subexpressions cannot defeat the recomputation; unrolled they could.
            run_block = jax.checkpoint(run_block, policy=policy, prevent_cse=not scanned, static_argnums=(3,))

        outputs, stream = [], Stream(x)
        if scanned:
            for run in layer_runs(self.config.layer_attention):
                stream, output = _scan(run, run_block, layers, stream, slice_first=attend.cache is None)
                outputs.append(output)
            return stream.made(), *jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)
        if unroll is False:
            raise ValueError("unroll=False scans stacked layers; got parameters from unstack()")
        for layer, attention in enumerate(self.config.layer_attention):
            stream, output = run_block(_layer(layers, layer), stream, layer, attention)
            outputs.append(output)
        return stream.made(), *jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)


def _layer(layers: Params, index: int | Array) -> Params:
    """One layer of all. Quantized weights stay in their stack, which their kernels read in place."""

    def one(leaf: Array | QuantizedTensor | tuple) -> Array | QuantizedTensor:
        if isinstance(leaf, tuple):
            return leaf[index]
        if isinstance(leaf, QuantizedTensor):
            return leaf.of_layer(index)
        return jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False)

    return jax.tree.map(one, layers, is_leaf=_is_weight)


def _by_layer(stack: Array | QuantizedTensor) -> tuple:
    """The layers of a stack, each with arrays of its own: views on a CPU, copies elsewhere."""

    def views(stacked: Array) -> list[Array]:
        if isinstance(stacked, jax.core.Tracer):
            raise ValueError("unstack() makes views of concrete arrays; call it outside of jit")
        devices = stacked.devices()
        if len(devices) == 1 and next(iter(devices)).platform == "cpu":
            host = np.asarray(stacked)
            return [jax.device_put(host[i], next(iter(devices))) for i in range(len(host))]
        return [stacked[i] for i in range(stacked.shape[0])]

    leaves, treedef = jax.tree.flatten(stack)
    return tuple(jax.tree.unflatten(treedef, layer) for layer in zip(*map(views, leaves), strict=True))


def _is_quantized(node: Any) -> bool:
    return isinstance(node, QuantizedTensor)


def _is_weight(node: Any) -> bool:
    """Whether a node of the blocks' parameters is all layers of one weight, in a stack or by layer."""
    return isinstance(node, tuple | QuantizedTensor)


def is_stacked(layers: Params) -> bool:
    """Whether the blocks' parameters are all stacks, as training and checkpoints keep them."""
    return not any(isinstance(leaf, tuple) for leaf in jax.tree.leaves(layers, is_leaf=_is_weight))


def _scan(run: Run, run_block: Callable, layers: Params, x: Stream, *, slice_first: bool) -> tuple[Stream, tuple]:
    """Scans `run_block` over the layers of a run; the outputs are stacked, layer axis first.

    With `slice_first` the scan consumes the run's part of the parameters, which is what a backward pass
    needs: each layer's gradient is then written once. Otherwise each layer is picked from the whole stack by
    its index, so that a model of several runs copies no part of its weights in a decode step.
    """
    period = len(run.pattern)
    steps = jnp.arange(run.repeats, dtype=jnp.int32)

    def part(leaf: Array) -> Array:
        chosen = leaf[run.start : run.start + period * run.repeats]
        return chosen if period == 1 else chosen.reshape(run.repeats, period, *leaf.shape[1:])

    def body(x: Stream, inputs: tuple[Array, Params | None]) -> tuple[Stream, tuple]:
        step, params = inputs
        outputs = []
        for offset, attention in enumerate(run.pattern):
            layer = run.start + step * period + offset
            if params is None:
                own = _layer(layers, layer)
            else:
                # What the scan consumes is no residual of its backward pass; an index into it would be, a second copy.
                own = params if period == 1 else _layer(params, offset)
            x, output = run_block(own, x, layer, attention)
            outputs.append(output)
        return x, jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)

    x, outputs = jax.lax.scan(body, x, (steps, jax.tree.map(part, layers) if slice_first else None))
    return x, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs)


@functools.lru_cache(maxsize=32)
def build(config: QwenConfig) -> CausalLM:
    """The pure functions of a configuration; allocates nothing."""
    return CausalLM(config)
