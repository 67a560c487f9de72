"""What a step will take before it runs: memory per device from the compiled program, FLOPs from its trace."""

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any

import jax

__all__ = ["MemoryEstimate", "count_flops", "device_memory", "peak_flops"]

# Dense matrix-multiply peak per device, FLOP/s, without sparsity: vendor data sheets (SXM parts). For float32 it is
# that of TF32, which XLA uses for float32 products on these devices unless told otherwise.
PEAK_FLOPS = {
    "NVIDIA H100": {"bfloat16": 989e12, "float32": 495e12},
    "NVIDIA H200": {"bfloat16": 989e12, "float32": 495e12},
    "NVIDIA A100": {"bfloat16": 312e12, "float32": 156e12},
    "NVIDIA B200": {"bfloat16": 2250e12, "float32": 1125e12},
}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Peak FLOP/s of one device at `dtype`; None where it is not known (then no MFU is reported)."""
    for name, peaks in PEAK_FLOPS.items():
        if device_kind.startswith(name):
            return peaks.get(dtype)
    return None


def device_memory(device: jax.Device) -> int | None:
    """Bytes that programs on this device can use; for a CPU the machine's memory."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per device of one compiled step."""

    state: int  # arguments: parameters, optimiser state, batch; results replace them in place
    working: int  # activations, gradients, and results that found no donated buffer

    @classmethod
    def of(cls, compiled: Any) -> "MemoryEstimate":
        """From `jax.jit(f).lower(...).compile()`."""
        m = compiled.memory_analysis()
        new_results = max(0, m.output_size_in_bytes - m.alias_size_in_bytes)
        return cls(m.argument_size_in_bytes, m.temp_size_in_bytes + new_results)

    @property
    def total(self) -> int:
        return self.state + self.working

    def describe(self, limit: int | None, remedies: tuple[str, ...]) -> str:
        """One line; names what lowers it when it is a large part of `limit` bytes."""
        text = (
            f"memory per device: {_gigabytes(self.total)} predicted "
            f"(state {_gigabytes(self.state)}, activations and gradients {_gigabytes(self.working)})"
        )
        if limit is not None:
            text += f" of {_gigabytes(limit)}"
        if remedies and (limit is None or self.total > limit // 2):
            text += f"; lower it with {', '.join(remedies)}"
        return text


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def count_flops(function: Callable, *args: Any) -> int:
    """Floating-point operations of all matrix products in `function(*args)`; args may be abstract.

    2 per multiply-add; scans count every iteration, the costlier branch of a cond, and one iteration of a
    `while` whose length is not static. Elementwise work is left out, as is usual for MFU.
    """
    return _flops(jax.make_jaxpr(function)(*args).jaxpr)


def _flops(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
            continue
        inner = [_flops(j) for value in params.values() for j in _jaxprs(value)]
        if name == "scan":
            total += params["length"] * sum(inner)
        elif name == "cond":
            total += max(inner, default=0)
        elif name.startswith(("custom_vjp", "custom_jvp")):
            total += max(inner, default=0)  # the function itself, not its rules
        else:
            total += sum(inner)
    return total


def _jaxprs(value: Any) -> list[Any]:
    if hasattr(value, "eqns"):
        return [value]
    if hasattr(value, "jaxpr") and hasattr(value.jaxpr, "eqns"):
        return [value.jaxpr]
    if isinstance(value, (list, tuple)):
        return [j for v in value for j in _jaxprs(v)]
    return []
