"""`python -m infer env`: what a bug report needs. JAX is imported by `main`, not by this module."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
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
    """What a typical call of each operation gets, and why not the others.

    Typical are 4096 causal tokens, one token against a cache of 8192, bfloat16, 32 heads on 8, of 128, the norms of
    these heads of one token, and one token times an int4 weight of 4096 x 4096. Per operation and implementation:
    "active" (chosen when none is named; perhaps only with or without gradients), "available by name" and why it was not
    chosen, or "not active" and why it cannot run. Asks by tracing; nothing is computed.
    """
    import jax
    import jax.numpy as jnp

    from pallas_kernels import rotation
    from pallas_kernels.attention import api as attention
    from pallas_kernels.attention.limits import Limits
    from pallas_kernels.decode_attention import api as decode
    from pallas_kernels.decode_attention.operands import Operands
    from pallas_kernels.masks import Causal
    from pallas_kernels.moba import api as moba
    from pallas_kernels.moba import mosaic_sm90 as moba_kernels
    from pallas_kernels.norm_rope import api as norm_rope
    from pallas_kernels.norm_rope import mosaic_sm90 as norm_rope_kernel
    from pallas_kernels.quantized_matmul import api as products
    from pallas_kernels.quantized_matmul.rounding import round_weight
    from pallas_kernels.rotation import api as rotation_api
    from pallas_kernels.rotation import mosaic_sm90 as rotation_kernel

    found: dict[str, dict[str, str | None]] = {"flash_attention": {}, "decode_attention": {}}
    found |= {"moba_attention": {}, "quantized_matmul": {}, "pairwise_rotation": {}, "norm_rope": {}}
    chosen: dict[str, dict[str, list[str]]] = {op: {} for op in found}
    reasons: dict[str, str] = {}

    def ask_flash(q, k, v):
        options: dict[str, Any] = {
            "mask": Causal(),
            "limits": Limits(),
            "scale": 1.0,
            "return_lse": False,
            "skip": None,
        }
        for name, module in attention.IMPLEMENTATIONS.items():
            found["flash_attention"][name] = module.unsupported(q, k, v, **options)
        choice = attention.automatic(q, k, v, **options)
        chosen["flash_attention"].setdefault(choice.forward, []).append("without gradients")
        chosen["flash_attention"].setdefault(choice.gradient, []).append("with gradients")
        reasons["flash_attention"] = "; ".join(dict.fromkeys(reason for reason in choice.reasons.values() if reason))

    def ask_decode(q, k_cache, v_cache, own, lengths):
        operands = Operands(jnp.int32(0), lengths, None, lengths[:, None], own, own, None, None, 0)
        options: dict[str, Any] = {"operands": operands, "own_mask": Causal(), "scale": 1.0, "skip": None}
        for name, module in decode.IMPLEMENTATIONS.items():
            found["decode_attention"][name] = module.unsupported(q, k_cache, v_cache, **options)
        name, reasons["decode_attention"] = decode.automatic(q, k_cache, v_cache, **options)
        chosen["decode_attention"][name] = ["without gradients", "with gradients"]

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    jax.eval_shape(ask_flash, array(1, 4096, 32, 128), array(1, 4096, 8, 128), array(1, 4096, 8, 128))
    cache, own = array(1, 1, 8192, 8, 128), array(1, 1, 8, 128)
    jax.eval_shape(ask_decode, array(1, 1, 32, 128), cache, cache, own, array(1, dtype=jnp.int32))

    def ask_moba(q, k, v):
        options: dict[str, Any] = {"block_size": 128, "top_k": 8, "causal": True}
        why_not = moba_kernels.unsupported(q, k, v, **options)
        found["moba_attention"] = {"mosaic": why_not, "xla": None, "reference": None}
        choice = moba.automatic(q, k, v, **options, packed=False)
        chosen["moba_attention"].setdefault(choice.forward, []).append("without gradients")
        chosen["moba_attention"].setdefault(choice.gradient, []).append("with gradients")
        reasons["moba_attention"] = "; ".join(dict.fromkeys(reason for reason in choice.reasons.values() if reason))

    jax.eval_shape(ask_moba, *[array(1, 4096, 16, 128)] * 3)

    def ask_product(x, weight):
        quantized = round_weight(weight, "int4")
        found["quantized_matmul"] = {
            "mosaic": products.hopper_unsupported(x, quantized),
            "xla": None,
            "reference": None,
        }
        name, reasons["quantized_matmul"] = products.automatic(x, quantized, dtype=x.dtype)
        chosen["quantized_matmul"][name] = ["without gradients", "with gradients"]

    jax.eval_shape(ask_product, array(1, 4096), array(4096, 4096))

    def ask_rotation(x, theta, pairs):
        turns: Any = (rotation.Turn(theta, pairs),)
        options: dict[str, Any] = {"group_size": 128}
        why_not = rotation_kernel.unsupported(x, turns, **options)
        found["pairwise_rotation"] = {"mosaic": why_not, "xla": None, "reference": None}
        name, reasons["pairwise_rotation"] = rotation_api.automatic(x, turns, **options)
        chosen["pairwise_rotation"][name] = ["without gradients", "with gradients"]

    jax.eval_shape(ask_rotation, array(1, 4096), array(8, 2048), array(8, 4096, dtype=jnp.int16))

    def ask_norm_rope(q, k, weight, table):
        given: Any = ((q, k), (weight, weight), table, table)
        found["norm_rope"] = {"mosaic": norm_rope_kernel.unsupported(*given), "xla": None, "reference": None}
        name, reasons["norm_rope"] = norm_rope.automatic(*given)
        chosen["norm_rope"][name] = ["without gradients", "with gradients"]

    table = array(1, 1, 64, dtype=jnp.float32)
    jax.eval_shape(ask_norm_rope, array(1, 1, 32, 128), own, array(128), table)

    report = {}
    for op, implementations in found.items():
        for name, why_not in implementations.items():
            if uses := chosen[op].get(name):
                state = "active" if len(uses) == 2 else f"active {uses[0]}"
            elif why_not is not None:
                state = f"not active: {_one_line(why_not)}"
            elif name != "reference" and reasons[op]:
                state = f"available by name: {_one_line(reasons[op])}"
            else:
                state = "available by name"
            report[f"{op} {name}"] = state
    return report
