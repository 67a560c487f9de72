"""Compiles the project's Mosaic GPU kernels for Hopper on a machine without a GPU, and judges the machine code.

    pip install ".[gpu-compile]"                 # the CUDA plugin of JAX, ptxas and nvdisasm; no driver, no GPU
    python -m pallas_kernels.compile_gate        # the shipped configurations; --all adds the exploratory ones
    python -m pallas_kernels.compile_gate --quick    # one of each kind, as on every change

XLA compiles against a textual description of an H100 instead of a device, down to SASS for sm_90a, so whatever XLA
or ptxas would reject on the real machine is rejected here. For each kernel the report shows spilled bytes, shared
memory, the instructions that matter (HGMMA: tensor core, UTMALDG: TMA load) and the warnings of ptxas, above all
"wgmma serialized", which costs a factor. With `setmaxnreg` the register count is the launch-time allocation; the
spills are the number to watch. Nothing here measures speed.

Exit code: 0 all pass; 1 a kernel compiles but fails its gate; 2 a kernel does not compile; 3 the CUDA plugin or
nvdisasm is missing, or the arguments are wrong.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from pallas_kernels import compat, dispatch

# Each of these has `compile_cases()`, an iterator of CompileCase.
MODULES = (
    "pallas_kernels.attention.mosaic_sm90",
    "pallas_kernels.decode_attention.mosaic_sm90",
    "pallas_kernels.moba.mosaic_sm90",
    "pallas_kernels.norm_rope.mosaic_sm90",
    "pallas_kernels.quantized_matmul.mosaic_sm90",
    "pallas_kernels.rotation.mosaic_sm90",
)

# One of each kind of kernel: what every change compiles. Names of shipped cases.
QUICK = (
    "attention forward causal bfloat16 H=64 tiles 64 128 4",
    "attention backward causal bfloat16 H=64 tiles 128 128 3 3",
    "attention forward causal bfloat16 H=128 tiles 64 128 2",
    "attention backward causal bfloat16 H=128 tiles 64 128 3 2",
    "attention forward doubled bfloat16 H=128 tiles 64 128 2",
    "attention backward doubled bfloat16 H=128 tiles 64 128 3 2",
    "attention forward causal bfloat16 H=256 tiles 64 64 2",
    "attention forward causal bfloat16 H=128 tiles 64 128 2 skipping",
    "decode attention H=128 T=1",
    "decode attention H=128 T=32",
    "decode attention H=128 T=32 int8 per token",
    "decode attention skipping H=128 T=1",
    "decode attention skipping H=128 T=32",
    "decode attention merge H=128 80 parts",
    "moba select ranks=7 H=128",
    "moba attend block=128 H=128",
    "moba dq block=128 H=128",
    "moba dk dv block=128 H=128",
    "moba add pieces block=128 H=128",
    "norm rope M=1 N=32+8 H=128 bfloat16 weights bfloat16",
    "rotation M=8 I=4096 groups of 128 x3 8 steps float16",
    "w4a16 M=1 4096x4096 groups of 128 float16 zeros to float32",
    "w4a16 M=64 4096x4096 groups of 128 float16 zeros to float32",
    "w4a16 M=4096 4096x4096 groups of 128 float16 zeros to bfloat16",
    "w8a16 int8 M=16 4096x4096 groups of -1 float32 to float32",
    "w8a16 fp8 M=16 4096x4096 groups of 128 float32 to float32",
    "nvfp4 M=16 4096x4096 groups of 16 float8_e4m3fn to float32",
    "nvfp4 M=4096 4096x4096 groups of 16 float8_e4m3fn to bfloat16",
)

GPUS = {  # name, memory bandwidth in bytes/s, memory in bytes
    "h100": ("NVIDIA H100 80GB HBM3", 3352320000000, 84929347584),
    "h200": ("NVIDIA H200", 4814720000000, 150120103936),
}
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {memory}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""

# What to count in SASS.
INSTRUCTIONS = {
    "HGMMA": r"\b[HIQ]GMMA\.",
    "UTMALDG": r"\bUTMALDG",
    "UTMASTG": r"\bUTMASTG",
    "LDGSTS": r"\bLDGSTS",
    "FENCE": r"\bFENCE\.VIEW\.ASYNC",
    "MUFU.EX2": r"\bMUFU\.EX2",
    "HMMA": r"\b[HI]MMA\.",
    "I2F": r"\bI2F",
    "LDL": r"\bLDL",
    "STL": r"\bSTL",
}


class MissingToolError(RuntimeError):
    """The environment cannot compile for CUDA."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileCase:
    """One call to compile.

    Attributes:
      name: unique among all cases.
      function: of positional arguments.
      avals: `jax.ShapeDtypeStruct` of each, or trees of them.
      shipped: False for configurations that only the full sweep compiles.
      max_spill: bytes a kernel may spill; more than 0 needs a `reason`.
      required: instructions every kernel of the call must contain.
    """

    name: str
    function: Callable[..., Any]
    avals: tuple[Any, ...]
    shipped: bool = True
    max_spill: int = 0
    reason: str = ""
    required: tuple[str, ...] = ("HGMMA", "UTMALDG")

    def __post_init__(self):
        if self.max_spill and not self.reason:
            raise ValueError(f"case {self.name!r} allows spills, max_spill={self.max_spill}, without a reason")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelReport:
    """What ptxas made of one kernel. Sizes in bytes."""

    registers: int
    spill_stores: int
    spill_loads: int
    shared_memory: int
    instructions: dict[str, int]
    wgmma_shapes: dict[str, int]
    warnings: tuple[str, ...]

    def failures(self, case: CompileCase) -> list[str]:
        """Why this kernel does not pass, in words."""
        found = [f"no {name}" for name in case.required if not self.instructions.get(name)]
        if (spill := max(self.spill_stores, self.spill_loads)) > case.max_spill:
            found.append(f"spills {spill} bytes, allowed {case.max_spill}")
        if self.shared_memory > compat.SHARED_MEMORY_BYTES:
            found.append(f"shared memory {self.shared_memory} of {compat.SHARED_MEMORY_BYTES} bytes")
        if any("serialized" in warning for warning in self.warnings):
            found.append("wgmma serialized")
        return found

    def __str__(self) -> str:
        counts = " ".join(f"{name}:{count}" for name, count in self.instructions.items())
        shapes = ", ".join(f"{shape} x{count}" for shape, count in self.wgmma_shapes.items())
        lines = [
            f"  spills {self.spill_stores} B stored / {self.spill_loads} B loaded, registers {self.registers}, "
            f"shared memory {self.shared_memory / 1024:.1f} of {compat.SHARED_MEMORY_BYTES / 1024:.0f} KiB",
            f"  {counts}; wgmma {shapes or 'none'}",
        ]
        return "\n".join(lines + [f"  ! {warning}" for warning in self.warnings])


def cases(*, shipped_only: bool = True, name_contains: str = "") -> Iterator[CompileCase]:
    """The cases of all kernels."""
    for module in MODULES:
        for case in importlib.import_module(module).compile_cases():
            if (case.shipped or not shipped_only) and name_contains in case.name:
                yield case


def hopper_mesh(gpu: str = "h100", count: int = 1) -> jax.sharding.Mesh:
    """A mesh of imaginary GPUs with one automatic axis; arguments laid out on it make `jit` compile for them."""
    from jax.experimental import topologies

    name, bandwidth, memory = GPUS[gpu]
    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            topology=f"1x1x{count}",
            target_config=_TARGET.format(name=name, bandwidth=bandwidth, memory=memory),
        )
    except Exception as error:  # the plugin's loader raises whatever its entry point raises
        raise MissingToolError(
            f"the CUDA plugin of JAX {jax.__version__} cannot be used ({type(error).__name__}: {str(error)[:200]}); "
            f"install the extra gpu-compile, jax-cuda13-plugin and jax-cuda13-pjrt in exactly that version"
        ) from error
    return topologies.make_mesh(topology, (count,), ("gpu",))


def hopper_sharding(gpu: str = "h100") -> jax.sharding.Sharding:
    """A sharding on one imaginary GPU."""
    return jax.sharding.NamedSharding(hopper_mesh(gpu), jax.sharding.PartitionSpec())


def _on_two_gpus(function: Callable[..., Any], *avals: Any) -> tuple[list[str], list[str]]:
    """Lines of HLO: the kernels of a call, and what it sends; compiled for the two devices of its arguments."""
    with (
        mock.patch.object(jax, "device_count", lambda: 2),  # this machine's own would be one CPU
        mock.patch.object(compat, "missing_hopper", lambda: None),
        mock.patch.object(dispatch, "preferred", lambda *_, **__: (("mosaic", "xla"), "")),
    ):
        text = jax.jit(function).trace(*avals).lower(lowering_platforms=("cuda",)).compile().as_text()
    lines = text.splitlines()
    sent = r"= .* (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\("
    kernels = [line for line in lines if 'custom_call_target="mosaic_gpu' in line]
    return kernels, [line.strip()[:200] for line in lines if re.search(sent, line)]


def uncut_attention(axis: int, gpu: str = "h100") -> str | None:
    """Why the kernels of a program for two GPUs do not each see half of `axis`, 0 rows or 2 heads; None when they do.

    Compiles flash attention with its gradients on a mesh of an automatic axis, so through `partitioning.cut`.
    """
    from pallas_kernels.attention import mosaic_sm90
    from pallas_kernels.attention.limits import Limits
    from pallas_kernels.masks import Causal

    mesh = hopper_mesh(gpu, 2)

    def loss(q, k, v, lengths):
        limits = Limits(kv_lengths=lengths)
        return mosaic_sm90.run(q, k, v, mask=Causal(), limits=limits, scale=0.1)[0].astype("float32").sum()

    def halved(*shape, dtype="bfloat16"):
        spec = jax.sharding.PartitionSpec(*(None,) * axis, "gpu") if axis < len(shape) else jax.sharding.PartitionSpec()
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    avals = (halved(4, 1024, 8, 128), *[halved(4, 1024, 2, 128)] * 2, halved(4, dtype="int32"))
    kernels, sent = _on_two_gpus(jax.grad(loss, argnums=(0, 1, 2)), *avals)
    wanted = {"4,1024,4,128", "4,1024,1,128"} if axis else {"2,1024,8,128", "2,1024,2,128"}
    cut = [line for line in kernels if set(re.findall(r"bf16\[([\d,]+)\]", line)) <= wanted]
    if len(kernels) != 3 or cut != kernels or sent:
        return f"{len(cut)} of {len(kernels)} kernels see their half, of 3; sends {sent}"
    return None


def uncut_product(axis: str, gpu: str = "h100") -> str | None:
    """The same for a rotated and quantized weight in halves of its "outputs", or with the activations of its "inputs".

    The former may send nothing, the latter the float32 sums of the results alone.
    """
    from pallas_kernels.quantized_matmul import QuantizedTensor, Rotation, quantized_matmul

    mesh, layers, rows, (outputs, inputs) = hopper_mesh(gpu, 2), 4, 16, (4096, 12288)
    by_outputs, by_inputs = ("gpu" if axis == name else None for name in ("outputs", "inputs"))

    def lying(dtype, shape, *spec):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    grid, groups = (layers, inputs // 128, outputs), (None, by_inputs, by_outputs)
    weight = QuantizedTensor(
        codes=lying("uint8", (layers, outputs, inputs // 2), None, by_outputs, by_inputs),
        scales=lying("float16", grid, *groups),
        zeros=lying("int8", grid, *groups),
        rotation=Rotation(
            lying("float16", (layers, 8, inputs // 2), None, None, by_inputs),
            lying("int16", (layers, 8, inputs), None, None, by_inputs),
        ),
        shape=(outputs, inputs),
    )

    def product(x, weight, layer):
        return quantized_matmul(x, weight.of_layer(layer), implementation="mosaic")

    x, layer = lying("bfloat16", (rows, inputs), None, by_inputs), lying("int32", ())
    kernels, sent = _on_two_gpus(product, x, weight, layer)
    own_outputs, own_inputs = outputs // 2 if by_outputs else outputs, inputs // 2 if by_inputs else inputs
    codes, turned = f"u8[{layers},{own_outputs},{own_inputs // 2}]", f"= bf16[{rows},{own_inputs}]"
    found = [sum(part in line for line in kernels) for part in (codes, turned)]
    sums = [line for line in sent if f"= f32[{rows},{outputs}]" in line and " all-reduce" in line]
    if found != [1, 1] or len(kernels) != 2 or sent != sums or len(sums) != (axis == "inputs"):
        return f"of {len(kernels)} kernels {found[0]} multiply {codes} and {found[1]} give {turned}; sends {sent}"
    return None


ON_TWO_GPUS: dict[str, Callable[[str], str | None]] = {
    "flash attention with gradients, rows on two GPUs": functools.partial(uncut_attention, 0),
    "flash attention with gradients, heads on two GPUs": functools.partial(uncut_attention, 2),
    "w4a16 and rotation, outputs on two GPUs": functools.partial(uncut_product, "outputs"),
    "w4a16 and rotation, inputs on two GPUs": functools.partial(uncut_product, "inputs"),
}
"""Of what is cut, for a GPU of `GPUS`: why the kernels do not each run on their half, or more is sent than the sums."""


def _cuda_root() -> Path:
    """The directory whose `bin` holds nvdisasm."""
    roots = []
    with contextlib.suppress(ImportError):
        roots += [Path(path) for path in importlib.import_module("nvidia.cu13").__path__]
    if found := shutil.which("nvdisasm"):
        roots.append(Path(found).resolve().parent.parent)
    roots.append(Path("/usr/local/cuda"))
    for root in roots:
        if (root / "bin" / "nvdisasm").exists():
            return root
    raise MissingToolError("nvdisasm not found; install the extra gpu-compile (nvidia-cuda-nvdisasm)")


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    """Sends the process's standard error to a file: ptxas is a subprocess, its messages never pass through Python."""
    sys.stderr.flush()
    saved = os.dup(2)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)


def compile_case(case: CompileCase, *, gpu: str = "h100", keep: Path | None = None) -> list[KernelReport]:
    """Compiles one case; one report per Mosaic GPU kernel in it.

    A kernel that this process compiled before is cached and not reported again.

    Args:
      case: the call.
      gpu: key of GPUS.
      keep: directory of this case alone that receives PTX, SASS and logs; what an earlier run left in it goes.

    Raises:
      MissingToolError: no CUDA plugin or no nvdisasm.
      RuntimeError: the call does not compile, with the messages of ptxas; or it contains no Mosaic GPU kernel.
    """
    sharding = hopper_sharding(gpu)
    root = _cuda_root()
    importlib.import_module("jax.experimental.mosaic.gpu")  # its import overwrites MOSAIC_GPU_CUDA_ROOT

    avals = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), case.avals)
    with tempfile.TemporaryDirectory() as temporary:
        dump = Path(temporary) if keep is None else keep
        shutil.rmtree(dump, ignore_errors=True)  # of an earlier run
        dump.mkdir(parents=True)
        messages = dump / "stderr.txt"
        try:
            with _environment(MOSAIC_GPU_DUMP_TO=str(dump), MOSAIC_GPU_CUDA_ROOT=str(root)), _stderr_to(messages):
                # A new function object, or jit would find its trace of an earlier call.
                jitted = jax.jit(lambda *args: case.function(*args))
                jitted.trace(*avals).lower(lowering_platforms=("cuda",)).compile()
        except Exception as error:
            said = " ".join(messages.read_text(errors="replace").split())[-1500:]
            raise RuntimeError(f"{type(error).__name__}: {' '.join(str(error).split())[:600]} {said}") from error
        finally:
            for log in dump.glob("*.mlir-passes.log"):  # 50 to 200 MB each
                log.unlink()
        names = sorted(path.stem for path in dump.glob("*.ptx"))
        if not names:
            raise RuntimeError("compiled, but no Mosaic GPU kernel was found in it")
        return [_parse(dump, name) for name in names]


def _parse(dump: Path, name: str) -> KernelReport:
    def read(suffix: str) -> str:
        path = dump / f"{name}{suffix}"
        return path.read_text(errors="replace") if path.exists() else ""

    def number(pattern: str, text: str) -> int:
        found = re.search(pattern, text)
        if not found:
            raise RuntimeError(f"the compiler's output for {name} has no {pattern!r}; its format has changed")
        return int(found[1])

    log, ptx, mlir = read(".ptxas"), read(".ptx"), read(".after_layout_inference.txt")
    sass = read(".sass") or read(".sass_ctrl")
    if not sass:
        raise MissingToolError(f"nvdisasm gave no SASS for {name}")
    size = re.search(r"dynamic_shared_memory_size %(\S+)", mlir)
    shared = number(rf"%{re.escape(size[1])} = arith.constant (\d+) : i32", mlir) if size else 0
    counts = {key: len(re.findall(pattern, sass)) for key, pattern in INSTRUCTIONS.items()}
    shapes = collections.Counter(re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+\S*?)\s", ptx))
    lines = (" ".join(line.split()) for line in log.splitlines())
    return KernelReport(
        registers=number(r"Used (\d+) registers", log),
        spill_stores=number(r"(\d+) bytes spill stores", log),
        spill_loads=number(r"(\d+) bytes spill loads", log),
        shared_memory=shared,
        instructions={key: count for key, count in counts.items() if count},
        wgmma_shapes=dict(shapes),
        warnings=tuple(line for line in lines if "warning" in line.lower() or "Performance Loss" in line),
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.compile_gate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--all", action="store_true", help="also the exploratory configurations")
    parser.add_argument("--quick", action="store_true", help="only one of each kind of kernel")
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100")
    parser.add_argument("--json", type=Path, help="also write the reports to this file")
    parser.add_argument("--keep", type=Path, help="keep PTX, SASS and logs under this directory")
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:
        return 3 if stop.code else 0
    # The CUDA client must not start: there is no GPU.
    jax.config.update("jax_platforms", "cpu")
    selected = list(cases(shipped_only=not arguments.all, name_contains=arguments.filter))
    if arguments.quick:
        selected = [case for case in selected if case.name in QUICK]
    divided = [name for name in ON_TWO_GPUS if arguments.filter in name]
    if not selected and not divided:
        print(f"no case matches {arguments.filter!r}", file=sys.stderr)
        return 3
    status = 0
    results: list[dict[str, Any]] = []
    for case in selected:
        keep = arguments.keep and arguments.keep / re.sub(r"\W+", "_", case.name)
        print(case.name, flush=True)
        try:
            reports = compile_case(case, gpu=arguments.gpu, keep=keep)
        except MissingToolError as error:
            print(f"compile_gate: {error}", file=sys.stderr)
            return 3
        except RuntimeError as error:
            print(f"  DOES NOT COMPILE: {error}")
            results.append({"case": case.name, "error": str(error)})
            status = 2
            continue
        for report in reports:
            failures = report.failures(case)
            print(report)
            if failures:
                print(f"  FAILS: {'; '.join(failures)}")
                status = max(status, 1)
            results.append({"case": case.name, "failures": failures, **dataclasses.asdict(report)})
    for name in divided:
        print(name, flush=True)
        failure = ON_TWO_GPUS[name](arguments.gpu)
        print(
            f"  FAILS: {failure}"
            if failure
            else "  each runs the kernels on its half and sends sums of results at most"
        )
        status = max(status, 1 if failure else 0)
        results.append({"case": name, "failures": [failure] if failure else []})
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{len(selected) + len(divided)} cases, exit code {status}")
    return status


if __name__ == "__main__":
    sys.exit(main())
