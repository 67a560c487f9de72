"""Hopper kernels of `decode_attention`: `dense.py`, and `skipping.py` for calls with a threshold.

`parts.py` is what they share, the merge of partial results among it.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.attention.skip import DECODE_TILE, Skip
from pallas_kernels.decode_attention.mosaic_sm90 import dense, skipping
from pallas_kernels.decode_attention.mosaic_sm90.dense import Config, heuristic_config
from pallas_kernels.decode_attention.mosaic_sm90.parts import Form, Shares, form_of, merge
from pallas_kernels.decode_attention.mosaic_sm90.skipping import SkipConfig, heuristic_skip_config, unsupported_skip
from pallas_kernels.decode_attention.operands import CODES, Operands
from pallas_kernels.masks import Causal, Mask

MAX_QUERIES = 64
HEAD_DIMS = (64, 96, 128, 256)
CODE_HEAD_DIMS = (64, 128)
DTYPES = ("bfloat16", "float16")


def unsupported(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    *,
    operands: Operands,
    own_mask: Mask,
    scale: float,
    skip: Skip | None = None,
) -> str | None:
    """Why this call cannot run here, in words; None when it can."""
    head_dim, capacity = q.shape[3], k_cache.shape[2]
    if str(q.dtype) not in DTYPES:
        return f"needs bfloat16 or float16 queries; got {q.dtype}"
    if head_dim not in HEAD_DIMS:
        return f"needs head_dim in {HEAD_DIMS}; got {head_dim}"
    if q.shape[1] > MAX_QUERIES:
        return f"takes at most {MAX_QUERIES} queries per row; got {q.shape[1]}"
    if capacity % 8:
        return f"needs a cache whose slots are a multiple of 8; got {capacity}"
    if str(k_cache.dtype) in CODES:
        if str(q.dtype) != "bfloat16":
            return f"needs bfloat16 queries with a cache of codes; got {q.dtype}"
        if head_dim not in CODE_HEAD_DIMS:
            return f"needs head_dim in {CODE_HEAD_DIMS} with a cache of codes; got {head_dim}"
    if skip is not None and (reason := unsupported_skip(form_of(q, k_cache, operands), skip.tile)) is not None:
        return reason
    return compat.missing_hopper()


def run(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    *,
    operands: Operands,
    own_mask: Mask,
    scale: float,
    skip: Skip | None = None,
    config: Config | SkipConfig | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Array, Array] | tuple[Array, Array, Array]:
    """Output and log-sum-exp, with `skip` also which tiles of the cache were kept; see `decode_attention`.

    `config` is a `SkipConfig` with `skip`. `interpret` runs the kernels on the CPU, for tests.

    Raises:
      ValueError: `config` needs more shared memory than a CTA has.
    """
    form = form_of(q, k_cache, operands)
    if config is None and skip is None:
        config = heuristic_config(form.head_dim, codes=form.code_dtype is not None)
    elif config is None:
        config = heuristic_skip_config(form)
    if (needed := config.smem_bytes(form)) > compat.SHARED_MEMORY_BYTES:
        raise ValueError(
            f"{config} needs {needed} bytes of shared memory at head_dim {form.head_dim}; "
            f"a CTA has {compat.SHARED_MEMORY_BYTES}"
        )
    arguments = (q, k_cache, v_cache, operands)
    options: dict[str, Any] = {
        "form": form, "own_mask": own_mask, "scale": scale, "config": config, "interpret": interpret
    }  # fmt: skip
    if form.batch == 0:
        nothing = (jnp.zeros_like(q), jnp.zeros((0, q.shape[2], q.shape[1]), jnp.float32))
        if skip is None:
            return nothing
        return *nothing, jnp.zeros((0, form.num_kv_heads, -(-form.capacity // skip.tile.width)), bool)
    if skip is None:
        return dense.run(*arguments, **options)
    return skipping.run(*arguments, skip.log_threshold, chains=skip.tile.chains, **options)


def compile_cases():
    """What the compile gate compiles: each head dim and kind of cache, few and many rows, each form of masking."""
    from pallas_kernels.compile_gate import CompileCase

    bf16, f16, int8, fp8 = (jnp.dtype(name) for name in ("bfloat16", "float16", "int8", "float8_e4m3fn"))
    # name, T, H, dtype of queries, dtype of the cache, kind of scales, window
    forms = [
        *((f"H={h} T={t}", t, h, bf16, bf16, "", None) for h in HEAD_DIMS for t in (1, 32)),
        ("H=64 T=32 float16", 32, 64, f16, f16, "", None),
        ("H=128 T=1 window", 1, 128, bf16, bf16, "", 4096),
        ("H=128 T=32 window", 32, 128, bf16, bf16, "", 4096),
        ("H=64 T=1 int8 per head", 1, 64, bf16, int8, "head", None),
        *((f"H=128 T={t} {c} per {kind}", t, 128, bf16, c, kind, None)
          for t, c, kind in ((1, int8, "head"), (32, int8, "token"), (1, fp8, "token"), (32, fp8, "head"))),
        ("H=128 T=32 int8 per token, window", 32, 128, bf16, int8, "token", 4096),
    ]  # fmt: skip
    layers, batch, capacity, kv_heads, group = 4, 2, 8192, 8, 4
    array = jax.ShapeDtypeStruct
    for name, num_queries, head_dim, dtype, cache_dtype, kind, window in forms:

        def call(q, k, v, layer, lengths, own_k, own_v, *scales, window=window):
            k_scale, v_scale = scales or (None, None)
            operands = Operands(
                layer=layer,
                kv_lengths=lengths,
                k_positions=None,
                q_positions=lengths[:, None] + jnp.arange(q.shape[1]),
                own_k=own_k,
                own_v=own_v,
                own_lengths=None,
                window=window,
                num_sinks=4,
                k_scale=k_scale,
                v_scale=v_scale,
            )
            form = form_of(q, k, operands)
            config = heuristic_config(form.head_dim, codes=form.code_dtype is not None)
            options = {"own_mask": Causal(), "scale": form.head_dim**-0.5, "config": config, "interpret": None}
            return dense.attend(q, k, v, operands, dense.plan_of(operands, form, config), form, **options)

        cache = array((layers, batch, capacity, kv_heads, head_dim), cache_dtype)
        own = array((batch, num_queries, kv_heads, head_dim), dtype)
        shape = {"": None, "head": (layers, kv_heads), "token": (layers, batch, kv_heads, capacity)}[kind]
        yield CompileCase(
            name=f"decode attention {name}",
            function=call,
            avals=(
                array((batch, num_queries, kv_heads * group, head_dim), dtype),
                *[cache] * 2,
                array((), jnp.int32),
                array((batch,), jnp.int32),
                *[own] * 2,
                *([] if shape is None else [array(shape, jnp.float32)] * 2),
            ),
            max_spill=24 if cache_dtype == int8 and window else 0,
            reason="six scalars of the bounds of a window beside codes" if cache_dtype == int8 and window else "",
        )
    # name, T, H, dtype, whether slots have positions
    skipping_forms = [
        *((f"H={h} T={t}", t, h, bf16, False) for h in skipping.HEAD_DIMS for t in (1, 32, 64)),
        ("H=64 T=32 float16", 32, 64, f16, False),
        *((f"H=128 T={t} positions", t, 128, bf16, True) for t in (1, 32, 64)),
    ]
    for name, num_queries, head_dim, dtype, has_positions in skipping_forms:

        def call_skipping(q, k, v, layer, lengths, own_k, own_v, log_threshold, *positions):
            operands = Operands(
                layer=layer,
                kv_lengths=lengths,
                k_positions=positions[0] if positions else None,
                q_positions=lengths[:, None] + jnp.arange(q.shape[1]),
                own_k=own_k,
                own_v=own_v,
                own_lengths=None,
                window=None,
                num_sinks=0,
            )
            form = form_of(q, k, operands)
            options = {"own_mask": Causal(), "scale": form.head_dim**-0.5, "config": heuristic_skip_config(form)}
            plan = skipping.plan_of(operands, form, DECODE_TILE.chains, options["config"])
            options |= {"chains": DECODE_TILE.chains, "interpret": None}
            return skipping.attend(q, k, v, operands, plan, log_threshold, form, **options)

        cache = array((layers, batch, capacity, kv_heads, head_dim), dtype)
        own = array((batch, num_queries, kv_heads, head_dim), dtype)
        yield CompileCase(
            name=f"decode attention skipping {name}",
            function=call_skipping,
            avals=(
                array((batch, num_queries, kv_heads * group, head_dim), dtype),
                *[cache] * 2,
                array((), jnp.int32),
                array((batch,), jnp.int32),
                *[own] * 2,
                array((batch,), jnp.float32),
                *([array((batch, capacity), jnp.int32)] if has_positions else []),
            ),
        )
    for head_dim, num_parts in itertools.product((64, 128, 256), (16, 80)):

        def merge_parts(parts, lse, first, num, head_dim=head_dim):
            form = Form(batch, 32, kv_heads, group, head_dim, capacity, bf16, None, True, False, None, None)
            return merge(parts, lse, Shares(first, num), form, interpret=None)

        yield CompileCase(
            name=f"decode attention merge H={head_dim} {num_parts} parts",
            function=merge_parts,
            avals=(
                array((num_parts, kv_heads, 128, max(head_dim, 128)), bf16),
                array((num_parts, kv_heads, 128), jnp.float32),
                *[array((batch,), jnp.int32)] * 2,
            ),
            required=(),
        )
