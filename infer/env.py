"""`python -m infer env`: what a bug report needs. JAX is imported by `main`, not by this module."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

PACKAGES = ("jaxstream", "jax", "jaxlib", "flax", "optax", "numpy", "tokenizers", "safetensors")
CUDA_PACKAGES = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-cudnn-cu13")


@dataclasses.dataclass(frozen=True)
class Env:
    """Show versions, devices, and which kernels are active and why others are not."""

    json: bool = False
    """Print one JSON object."""


def main(config: Env) -> int:
    """Prints the report; returns the exit code."""
    report = collect()
    if config.json:
        print(json.dumps(report, indent=2))
        return 0
    width = max(len(name) for name in report)
    for name, value in report.items():
        lines = list(_lines(value))
        print(f"{name:<{width}}  {lines[0] if lines else 'none'}")
        for line in lines[1:]:
            print(f"{'':<{width}}  {line}")
    return 0


def _lines(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{key}: {item}"
    elif isinstance(value, list):
        for item in value:
            yield ", ".join(f"{k} {v}" for k, v in item.items()) if isinstance(item, dict) else str(item)
    else:
        yield str(value)


def collect() -> dict[str, Any]:
    """The report as JSON values. Starts JAX; a backend that cannot start is part of the report, not an error."""
    report: dict[str, Any] = {
        "python": f"{platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "packages": {name: version for name in (*PACKAGES, *CUDA_PACKAGES) if (version := _version(name))},
    }
    import jax

    try:
        report["devices"] = [_device(device) for device in jax.local_devices()]
        report["backend"] = _one_line(jax.local_devices()[0].client.platform_version)
    except RuntimeError as error:
        report["devices"] = f"JAX found no devices: {_one_line(error)}"
    report["driver"] = _driver()
    report["compilation cache"] = jax.config.jax_compilation_cache_dir or "off"
    report["environment"] = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("JAX_", "XLA_", "JAXSTREAM_", "CUDA_VISIBLE")) or name in ("HF_HOME", "HF_HUB_OFFLINE")
    }
    if isinstance(report["devices"], list):
        report["kernels"] = kernels()
    return report


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())


def _device(device: Any) -> dict[str, Any]:
    info = {"id": device.id, "platform": device.platform, "kind": device.device_kind}
    capability = getattr(device, "compute_capability", None)
    if capability is not None:
        info["compute capability"] = str(capability)
    memory = (device.memory_stats() or {}).get("bytes_limit")
    if memory:
        info["memory"] = f"{memory / 2**30:.1f} GiB usable by JAX"
    return info


def _driver() -> str:
    """The NVIDIA driver as nvidia-smi reports it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "no nvidia-smi: no NVIDIA driver, or not on the PATH"
    command = [program, "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return "nvidia-smi did not answer in 20 s"
    return "; ".join(done.stdout.strip().splitlines()) or _one_line(done.stderr) or f"nvidia-smi: {done.returncode}"


def kernels() -> dict[str, str]:
    """Per operation and implementation: "active" (what a typical call gets), "available by name", or why not.

    Asks by tracing a call of each implementation by name; nothing is computed.
    """
    import jax
    import jax.numpy as jnp

    from pallas_kernels.attention import api as attention
    from pallas_kernels.decode_attention import api as decode

    q = jax.ShapeDtypeStruct((1, 256, 8, 128), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)
    one_q = jax.ShapeDtypeStruct((1, 1, 8, 128), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((1, 1, 256, 2, 128), jnp.bfloat16)

    def run_decode(name: str) -> None:
        def call(q, k_cache, v_cache):
            lengths = jnp.full(1, 100)
            return decode.decode_attention(q, k_cache, v_cache, layer=0, kv_lengths=lengths, implementation=name)

        jax.eval_shape(call, one_q, cache, cache)

    def run_flash(name: str) -> None:
        jax.eval_shape(lambda q, k, v: attention.flash_attention(q, k, v, implementation=name), q, kv, kv)

    return _reasons("flash_attention", attention, run_flash) | _reasons("decode_attention", decode, run_decode)


def _reasons(op: str, api: Any, run: Callable[[str], None]) -> dict[str, str]:
    report, chosen = {}, False
    for name in api.IMPLEMENTATIONS:
        try:
            run(name)
        except NotImplementedError as error:
            report[f"{op} {name}"] = f"not active: {_one_line(error)}"
            continue
        active = name in api.AUTOMATIC and not chosen
        report[f"{op} {name}"] = "active" if active else "available by name"
        chosen |= active
    return report
