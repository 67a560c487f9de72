"""Differences between the supported JAX versions (0.11.2 to 0.12) in Pallas Mosaic GPU, in one place.

Kernels use only names that `jax.experimental.pallas` and its `mosaic_gpu` export in both; what was added, renamed
or changed its default between them goes through here. Importing this module touches no device.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

SHARED_MEMORY_BYTES = 227 * 1024  # one CTA's limit on compute capability 9.0

_KERNEL_OPTIONS = inspect.signature(plgpu.kernel).parameters
_INTERPRET_OPTIONS = {field.name for field in dataclasses.fields(plgpu.InterpretGPUParams)}


def kernel(
    body: Callable[..., None],
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
    cost: tuple[int, int, int] | None = None,
    **options: Any,
) -> Callable[..., Any]:
    """`plgpu.kernel` with what only one of the versions takes.

    Args:
      body: the kernel function over references.
      interpret: None compiles; otherwise the kernel runs on the CPU under the interpreter. A test facility.
      cost: (floating-point operations, transcendentals, bytes moved) for XLA's scheduler; JAX 0.11 has no use for it.
      options: passed on to `plgpu.kernel`.
    """
    if interpret is not None:
        options["interpret"] = interpret
    if cost is not None and "cost_estimate" in _KERNEL_OPTIONS:
        flops, transcendentals, bytes_accessed = cost
        options["cost_estimate"] = pl.CostEstimate(
            flops=flops, transcendentals=transcendentals, bytes_accessed=bytes_accessed
        )
    return plgpu.kernel(body, **options)


def interpret_params(*, detect_races: bool = True) -> plgpu.InterpretGPUParams:
    """Parameters of the interpreter, for tests. From JAX 0.12 on a race raises; before, it only sets a flag."""
    options: dict[str, Any] = {"detect_races": detect_races}
    if detect_races and "on_race" in _INTERPRET_OPTIONS:
        options["on_race"] = "raise"
    return plgpu.InterpretGPUParams(**options)


def missing_hopper() -> str | None:
    """Why kernels for compute capability 9.0 cannot run on the default device, in words; None when they can."""
    device = jax.config.jax_default_device or jax.devices()[0]
    if isinstance(device, str):  # the name of a platform
        device = jax.devices(device)[0]
    if device.platform != "gpu":
        return f"needs an NVIDIA GPU of compute capability 9.0; the default device is {device.platform}"
    capability = str(getattr(device, "compute_capability", "unknown"))
    if capability != "9.0":
        return f"needs compute capability 9.0; {device.device_kind} has {capability}"
    return None


def varying_axes(x: Any) -> frozenset[str]:
    """Mesh axes that `x` varies over inside a `shard_map` that follows this (`check_vma`); else none."""
    kind = jax.typeof(x)
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma


def first(size: int, index: Any) -> pl.Slice:
    """`pl.ds(0, size)` of an array in global memory that may have fewer: the TMA fills the rest with zeros.

    From JAX 0.12 on Pallas refuses a slice that it sees reach beyond the end; `index`, whatever it is, hides that.
    """
    return pl.ds(index * 0, size)


def swizzled(dtype: Any, minor: int) -> tuple[Any, ...]:
    """Tiling and swizzle of a matrix operand in shared memory whose last axis has `minor` elements."""
    itemsize = jax.numpy.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(minor * itemsize * 8)
    # To mypy these are abstract: a method of their base has an empty body.
    tiling = plgpu.TilingTransform((8, swizzle // itemsize))  # type: ignore[abstract]
    return tiling, plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]


def whole_atoms(rows: int) -> int:
    """The least number of rows, from `rows` on, of which the TMA takes a `swizzled` matrix: eights, or fewer than 8.

    It fills the rest of a tile with zeros.
    """
    return rows if rows < 8 else -(-rows // 8) * 8


def shared_memory_bytes(buffers: Any) -> int:
    """Shared memory of a tree of `plgpu.SMEM` types; the allocator aligns each buffer to 1 KiB.

    Barriers (8 bytes each) and other scratch types count as one KiB all together.
    """
    total = 1024
    for buffer in jax.tree.leaves(buffers, is_leaf=lambda b: hasattr(b, "shape")):
        if hasattr(buffer, "shape") and hasattr(buffer, "dtype") and buffer.memory_space == plgpu.SMEM:
            size = jax.numpy.dtype(buffer.dtype).itemsize
            for length in buffer.shape:
                size *= length
            total += -(-size // 1024) * 1024
    return total
