"""Hopper kernels of `flash_attention`: warp-specialised TMA and wgmma over the live tiles of any structured mask.

`forward.py` and `backward.py` have a kernel or two each; `operands.py` prepares what they read, `parts.py` is what they
share inside. The tiles a CTA visits come from a table of runs (`tile_runs`): first the full ones, with no masking
arithmetic, then the partial ones, where each query compares the key index with its one or two intervals of visible
keys (`Mask.key_intervals`). Run-time limits (segments, positions, lengths) shorten the runs before the launch.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import compat, masks, partitioning
from pallas_kernels.attention.limits import Limits
from pallas_kernels.attention.mosaic_sm90 import backward, forward
from pallas_kernels.attention.mosaic_sm90.backward import (
    BackwardConfig,
    heuristic_backward_config,
    skip_backward_config,
)
from pallas_kernels.attention.mosaic_sm90.forward import Config, heuristic_config, skip_config
from pallas_kernels.attention.skip import Skip, SkipTile
from pallas_kernels.masks import Mask

# Of queries and keys, and of values.
HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256))
BACKWARD_HEAD_DIMS = ((64, 64), (96, 96), (128, 128))
DTYPES = ("bfloat16", "float16")

# How `partitioning.cut` may divide each array.
AXES = {
    **dict.fromkeys(("q", "dq"), "b t (k g) h"),
    **dict.fromkeys(("k", "dk"), "b s k h"),
    **dict.fromkeys(("v", "dv"), "b s k d"),
    **dict.fromkeys(("out", "d_out"), "b t (k g) d"),
    **dict.fromkeys(("lse", "d_lse"), "b (k g) t"),
    **dict.fromkeys(("q_segments", "q_positions"), "b t"),
    **dict.fromkeys(("k_segments", "k_positions"), "b s"),
    **dict.fromkeys(("kv_lengths", "log_threshold"), "b"),
    "keep": "b (k g) query_tiles key_tiles",
}

# Shipped kernels (is forward, head dim, form of masking) that spill a few scalars, in the walk over partial tiles only.
SPILLING = frozenset(
    {(False, 128, "doubled"), (False, 128, "window"), (False, 128, "segments"), (False, 64, "doubled")}
)


def unsupported(
    q: Array, k: Array, v: Array, *, mask: Mask, limits: Limits, scale: float, return_lse: bool, skip: Skip | None
) -> str | None:
    """Why this call cannot run here, in words; None when it can. Masks, limits and lengths are all supported."""
    if str(q.dtype) not in DTYPES:
        return f"needs bfloat16 or float16; got {q.dtype}"
    if (q.shape[3], v.shape[3]) not in HEAD_DIMS:
        listed = ", ".join(f"{a}" if a == b else f"{a} with values of {b}" for a, b in HEAD_DIMS)
        return f"needs one of the head dims {listed}; got {q.shape[3]} with values of {v.shape[3]}"
    if skip is not None and skip_config(q.shape[3], skip.tile) is None:
        return f"skips tiles of 64 rows and 64 keys, or 128 keys up to head dim 192; got {skip.tile} at {q.shape[3]}"
    return compat.missing_hopper()


def run(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    *,
    mask: Mask,
    limits: Limits,
    scale: float,
    skip: Skip | None = None,
    config: Config | None = None,
    backward_config: BackwardConfig | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Array, Array] | tuple[Array, Array, Array]:
    """Output and log-sum-exp, with `skip` also which tiles were kept; see `flash_attention`.

    `interpret` runs the kernels on the CPU, for tests.

    Raises:
      NotImplementedError: on a second differentiation, or a first where head_dim is not in BACKWARD_HEAD_DIMS.
      ValueError: a configuration needs more shared memory than a CTA has.
    """
    batch, num_queries, num_heads, head_dim = q.shape
    value_dim = v.shape[3]
    if skip is not None:
        if config is None:
            config = skip_config(head_dim, skip.tile)
        if backward_config is None:
            backward_config = skip_backward_config(head_dim, skip.tile)
        for name, given in (("config", config), ("backward_config", backward_config)):
            if given is None or (given.block_q, given.block_k) != (skip.tile.rows, skip.tile.width):
                raise ValueError(f"{name} must have the tiles that skipping asks for, {skip.tile}; got {given}")
    config = heuristic_config(head_dim) if config is None else config
    backward_config = heuristic_backward_config(head_dim) if backward_config is None else backward_config
    needed: dict[Any, int] = {config: config.smem_bytes(head_dim, q.dtype, value_dim)}
    if (head_dim, value_dim) in BACKWARD_HEAD_DIMS:
        needed[backward_config] = backward_config.smem_bytes(head_dim, q.dtype)
    for sized, size in needed.items():
        if size > compat.SHARED_MEMORY_BYTES:
            raise ValueError(
                f"{sized} needs {size} bytes of shared memory at head_dim {head_dim}; "
                f"a CTA has {compat.SHARED_MEMORY_BYTES}"
            )
    if batch == 0:
        out, lse = jnp.zeros((*q.shape[:3], value_dim), q.dtype), jnp.zeros((0, num_heads, num_queries), jnp.float32)
        tiles = (-(-num_queries // config.block_q), -(-k.shape[1] // config.block_k))
        keep = None if skip is None else jnp.zeros((0, num_heads, *tiles), bool)
    else:
        log_threshold = None if skip is None else skip.log_threshold
        static = _Static(mask, scale, config, backward_config, interpret)
        out, lse, keep = _attention(static, q, k, v, limits, log_threshold)
    return (out, lse) if keep is None else (out, lse, keep)


class _Static(NamedTuple):
    mask: Mask
    scale: float
    config: Config
    backward_config: BackwardConfig
    interpret: plgpu.InterpretGPUParams | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    static: _Static, q: Array, k: Array, v: Array, limits: Limits, log_threshold: Array | None
) -> tuple[Array, Array, Array | None]:
    mask, scale, config, _, interpret = static
    options: dict[str, Any] = {"mask": mask, "scale": scale, "config": config, "interpret": interpret}

    def call(*, q, k, v, log_threshold=None, **limits):
        results = forward.run(q, k, v, Limits(**limits), **options, log_threshold=log_threshold)
        return results if log_threshold is not None else results[:2]

    operands = {"q": q, "k": k, "v": v, "log_threshold": log_threshold, **limits._asdict()}
    names = ("out", "lse") if log_threshold is None else ("out", "lse", "keep")
    out, lse, *keep = partitioning.cut(call, operands, axes=AXES, results=names, **_along(q, k))
    return out, lse, keep[0] if keep else None


def _attention_fwd(static, q, k, v, limits, log_threshold):
    if (q.shape[3], v.shape[3]) not in BACKWARD_HEAD_DIMS:
        raise NotImplementedError(
            f'flash_attention "mosaic" computes no gradients at head dim {q.shape[3]} with values of {v.shape[3]}: '
            'their accumulators do not fit the registers; use implementation="xla" where a gradient is taken'
        )
    # A rematerialisation policy that keeps "attention" then need not run the forward pass again.
    results = _attention(static, q, k, v, limits, log_threshold)
    results = jax.tree.map(lambda x: checkpoint_name(x, "attention"), results)
    return results, (q, k, v, limits, *results)


def _attention_bwd(static, residuals, cotangents):
    dq, dk, dv = _first_order(static, *residuals, *cotangents[:2])
    return dq, dk, dv, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _first_order(static: _Static, q, k, v, limits, out, lse, keep, d_out, d_lse):
    mask, scale, _, config, interpret = static
    options: dict[str, Any] = {"mask": mask, "scale": scale, "config": config, "interpret": interpret}

    def call(*, q, k, v, out, lse, d_out, d_lse, keep=None, **limits):
        return backward.run(q, k, v, Limits(**limits), out, lse, d_out, d_lse, keep=keep, **options)

    operands = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "d_out": d_out, "d_lse": d_lse, "keep": keep}
    operands |= limits._asdict()
    names = ("dq", "dk", "dv")
    return partitioning.cut(call, operands, axes=AXES, results=names, **_along(q, k))


def _along(q: Array, k: Array) -> dict[str, Any]:
    """Rows and key heads, with the query heads that share them."""
    return {"along": (partitioning.ROWS, "k"), "units": {"g": q.shape[2] // k.shape[2]}}


@_first_order.defjvp
def _second_order(static, primals, tangents):
    raise NotImplementedError(
        'flash_attention "mosaic" has no second derivative: differentiate implementation="reference" instead'
    )


def compile_cases() -> Iterator:
    """What the compile gate compiles: each shipped configuration, and each form of masking at least once."""
    from pallas_kernels.compile_gate import CompileCase

    length = 8192
    causal = masks.Causal()
    forms: dict[str, tuple[Mask, tuple[str, ...]]] = {
        "causal": (causal, ()),
        "full": (masks.Full(), ()),
        "doubled": (masks.BlockDiffusion(length // 2, 64), ()),
        "window": (masks.SlidingWindow(1024, 4), ()),
        "segments": (causal, ("q_segments", "k_segments")),
        "positions": (causal, ("q_positions", "k_positions")),
        "lengths": (masks.Full(), ("kv_lengths",)),
    }

    def case(head_dims, dtype, form, tiles, *, is_shipped, skip_tile=None):
        mask, limited = forms[form]
        is_forward = isinstance(tiles, Config)
        options = {"mask": mask, "scale": head_dims[0] ** -0.5, "config": tiles, "interpret": None}

        def call(q, k, v, *rest):
            limits, rest = Limits(**dict(zip(limited, rest, strict=False))), rest[len(limited) :]
            if is_forward:
                return forward.run(q, k, v, limits, log_threshold=rest[0] if skip_tile else None, **options)
            return backward.run(q, k, v, limits, *rest[:4], keep=rest[4] if skip_tile else None, **options)

        def array(*shape, dtype=dtype):
            return jax.ShapeDtypeStruct(shape, dtype)

        per_row = [array(*((2,) if name == "kv_lengths" else (2, length)), dtype=jnp.int32) for name in limited]
        q, (k, v) = array(2, length, 16, head_dims[0]), (array(2, length, 4, size) for size in head_dims)
        lse = array(2, 16, length, dtype="float32")
        results = [] if is_forward else [q, lse, q, lse]  # and their cotangents
        if skip_tile:
            keep = array(2, 16, length // skip_tile.rows, length // skip_tile.width, dtype=bool)
            results += [array(2, dtype="float32") if is_forward else keep]
        name = f"attention {'forward' if is_forward else 'backward'} {form} {jnp.dtype(dtype).name} H={head_dims[0]} "
        spilling = (is_forward, head_dims[0], form) in SPILLING
        return CompileCase(
            name=name
            + "tiles "
            + " ".join(str(value) for value in vars(tiles).values())
            + " skipping" * bool(skip_tile),
            function=call,
            avals=(q, k, v, *per_row, *results),
            shipped=is_shipped,
            max_spill=256 if not is_shipped else 24 if spilling else 0,
            reason="exploratory" if not is_shipped else "a few scalars of masked tiles" if spilling else "",
        )

    def both(head_dims, dtype, form, tiles, backward_tiles, **options):
        yield case(head_dims, dtype, form, tiles, is_shipped=True, **options)
        if head_dims in BACKWARD_HEAD_DIMS:
            yield case(head_dims, dtype, form, backward_tiles, is_shipped=True, **options)

    shipped = [(head_dims, jnp.bfloat16, "causal") for head_dims in HEAD_DIMS]
    shipped += [((128, 128), jnp.bfloat16, name) for name in forms if name != "causal"]
    shipped += [((64, 64), jnp.float16, "doubled")]
    for head_dims, dtype, form in shipped:
        tiles = heuristic_config(head_dims[0]), heuristic_backward_config(head_dims[0])
        yield from both(head_dims, dtype, form, *tiles)
    for size, skip_tile in ((128, SkipTile(64, 128)), (128, SkipTile(64, 64)), (64, SkipTile(64, 128))):
        skipping = skip_config(size, skip_tile), skip_backward_config(size, skip_tile)
        yield from both((size, size), jnp.bfloat16, "causal", *skipping, skip_tile=skip_tile)
    explored: list[tuple[int, str, Config | BackwardConfig]] = [
        (64, "full", Config(block_q=128, block_k=128, stages=3)),
        (64, "causal", Config(block_q=64, block_k=256, stages=3)),
        (128, "causal", Config(block_q=64, block_k=64, stages=3)),
        (128, "doubled", Config(block_q=64, block_k=64, stages=4)),
        (64, "causal", BackwardConfig(block_q=64, block_k=64, q_stages=4, k_stages=4)),
        (128, "causal", BackwardConfig(block_q=64, block_k=64, q_stages=2, k_stages=3)),
    ]
    for size, form, exploratory in explored:
        yield case((size, size), jnp.bfloat16, form, exploratory, is_shipped=False)
