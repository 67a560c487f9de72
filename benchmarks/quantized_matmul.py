"""Products with quantized weights on a Hopper GPU: first that they are right at real sizes, then how fast they read.

    python -m benchmarks.quantized_matmul check      # every kind of call against NumPy in float64, and every code
    python -m benchmarks.quantized_matmul check --filter int8 fp8 nvfp4    # all formats but int4
    python -m benchmarks.quantized_matmul time       # cold caches, peers in the same process
    python -m benchmarks.quantized_matmul time --sweep --filter "M=8 4096x4096"    # every configuration of the kernel

Needs JAX with CUDA and NumPy.

Timing: one compiled call multiplies with the layers of a stack one after another, by the layer index, so that each
finds its weights cold: the codes of all layers together hold more than 300 MB, six times the L2 cache. The activations
of a layer are made from the result of the one before, by one elementwise operation, as models have it. `device us` is
the profiler's sum over all kernels of one layer, that operation and the sum of partial results included; `kernel us`
is the product's own kernel. `wall us` is the median wall time of a call over its layers. GB/s counts codes, scales,
zeros, activations and result once, and is compared with a device copy measured in the same run (bytes read plus bytes
written). `mosaic` puts the activations into the order of the kernel in that operation; `interleaved` has codes for
which there is nothing to do, as decoders take them. `dense` is XLA's product with bfloat16 weights, each layer an
array of its own; `xla` makes bfloat16 weights of the codes on the fly. Where activations are rounded, both `xla`,
which then multiplies in eight bits, and the kernel have that to do. A shape is timed after its result was compared
with NumPy's, and not when it is wrong.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from benchmarks import report
from benchmarks.decode_forward import copy_bandwidth
from pallas_kernels import compat
from pallas_kernels.quantized_matmul import QuantizedTensor, interleave, mosaic_sm90, quantized_matmul
from pallas_kernels.quantized_matmul.mosaic_sm90.codes import CODES

COLD_BYTES = 300 * 10**6  # of codes
LIMIT = 1e-5  # relative error in the L2 norm of float32 results
BFLOAT16_LIMIT = 2e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One product: M rows, I inputs, O outputs; codes of a format, by activations that are rounded to one or not."""

    rows: int = 1
    outputs: int = 4096
    inputs: int = 4096
    group_size: int = 128
    zeros: bool = True
    scales: str = "float16"
    dtype: str = "float32"
    layers: int = 2
    codes: str = "int4"
    activations: str | None = None

    @property
    def name(self) -> str:
        zeros = "zeros" if self.zeros else "symmetric"
        groups = f"groups of {self.group_size} {self.scales} {zeros}"
        codes = "" if self.codes == "int4" else f"{self.codes} "
        rounded = f"by {self.activations} " if self.activations else ""
        return f"M={self.rows} {self.outputs}x{self.inputs} {codes}{rounded}{groups} to {self.dtype}"

    @property
    def groups(self) -> int:
        return 1 if self.group_size == -1 else self.inputs // self.group_size

    def weight_bytes(self) -> int:
        """Codes, scales and zeros of one layer."""
        line = jnp.dtype(self.scales).itemsize + (1 if self.zeros else 0)
        return self.outputs * (CODES[self.codes].bytes(self.inputs) + self.groups * line)

    def bytes(self) -> int:
        result = self.rows * self.outputs * jnp.dtype(self.dtype).itemsize
        return self.weight_bytes() + 2 * self.rows * self.inputs + result

    def cold(self) -> "Shape":
        """With as many layers as no cache holds."""
        codes = CODES[self.codes].bytes(self.inputs)
        return dataclasses.replace(self, layers=max(2, -(-COLD_BYTES // (self.outputs * codes))))

    def avals(self) -> dict[str, Any]:
        """Shapes and dtypes of the arguments."""
        codes, array = CODES[self.codes], jax.ShapeDtypeStruct
        grid = (self.layers, self.groups, self.outputs)
        return {
            "x": array((self.rows, self.inputs), jnp.bfloat16),
            "codes": array((self.layers, self.outputs, codes.bytes(self.inputs)), codes.dtype),
            "scales": array(grid, self.scales),
            "zeros": array(grid, jnp.int8) if self.zeros else None,
            "global_scale": array((self.layers,), jnp.float32) if self.codes == "nvfp4" else None,
        }

    def arguments(self, seed: int = 0) -> dict[str, Any]:
        """Made on the host. Activations to be rounded are codes times a power of 2: no rounding but one is right."""
        rng, codes = np.random.default_rng(seed), CODES[self.codes]
        grid = (self.layers, self.groups, self.outputs)

        def codes_like(format, *size):
            bits = rng.integers(0, 256, size, np.uint8)
            if format == "fp8":
                bits[bits & 0x7F == 0x7F] = 0  # would mean no number
            return bits.view(CODES[format].dtype)

        if self.codes == "nvfp4":
            scales = rng.integers(0x10, 0x7F, grid, np.uint8).view(ml_dtypes.float8_e4m3fn)
        else:
            scales = rng.uniform(0.002, 0.02, grid).astype(jnp.dtype(self.scales))
        if self.activations is None:
            x = rng.normal(size=(self.rows, self.inputs))
        else:
            x = codes_like(self.activations, self.rows, self.inputs).astype(np.float32)
            x = np.maximum(x, -127) if self.activations == "int8" else x
            x[:, 0] = 127 if self.activations == "int8" else 448
            x /= 64
        arrays = {
            "x": x.astype(ml_dtypes.bfloat16),
            "codes": codes_like(self.codes, self.layers, self.outputs, codes.bytes(self.inputs)),
            "scales": scales,
            "zeros": rng.integers(-8, 8, grid, np.int8) if self.zeros else None,
            "global_scale": np.linspace(0.002, 0.003, self.layers, dtype="f4") if self.codes == "nvfp4" else None,
        }
        return jax.tree.map(jnp.asarray, arrays)

    def tensor(self, arguments: dict[str, Any]) -> QuantizedTensor:
        parts = {name: arguments[name] for name in PARTS}
        kind: dict[str, Any] = {"format": self.codes, "activations": self.activations}
        return QuantizedTensor(**parts, **kind, shape=(self.outputs, self.inputs), num_inputs=1)

    def interleaved(self, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """Arguments of the implementation "interleaved"; None if codes of this kind have no such order."""
        weight = interleave(self.tensor(arguments))
        return arguments | {"codes": weight.codes} if weight.interleaved else None

    def form(self) -> mosaic_sm90.Form:
        return mosaic_sm90.Form(
            rows=self.rows,
            inputs=self.inputs,
            outputs=self.outputs,
            layers=self.layers,
            groups=self.groups,
            scale_dtype=jnp.dtype(self.scales),
            has_zeros=self.zeros,
            dtype=jnp.dtype(self.dtype),
            format=self.codes,
            has_global_scale=self.codes == "nvfp4",
        )

    def product(self, implementation: Any) -> Callable[[Any, Any, dict[str, Any]], Any]:
        """`product(x, layer, arguments)` of an implementation, or of the kernel with a configuration."""
        config = None if isinstance(implementation, str) else implementation

        def mosaic(x, layer, arguments, interleaved=False):
            if self.activations is not None and config is None:
                return by_name(x, layer, arguments, "mosaic")
            operands = mosaic_sm90.Operands(x, **{name: arguments[name] for name in PARTS}, layer=layer)
            options: dict[str, Any] = {"group_size": self.group_size, "format": self.codes, "dtype": self.dtype}
            return mosaic_sm90.run_together([operands], **options, config=config, interleaved=interleaved)[0]

        def by_name(x, layer, arguments, name):
            weight = self.tensor(arguments).of_layer(layer)
            return quantized_matmul(x, weight, dtype=self.dtype, implementation=name)

        def xla(x, layer, arguments):
            return by_name(x, layer, arguments, "xla")

        def dense(x, layer, arguments):
            product = jnp.einsum("mi,oi->mo", x, arguments["dense"][layer], preferred_element_type=jnp.float32)
            return product.astype(self.dtype)

        others = {"xla": xla, "dense": dense, "interleaved": functools.partial(mosaic, interleaved=True)}
        return others.get(str(implementation), mosaic)


PARTS = ("codes", "scales", "zeros", "global_scale")


# ---------------------------------------------------------------------------------------------------------------
# Correctness


def meanings(format: str) -> np.ndarray:
    """What each code of a format stands for, from the format's definition; 480 and -480 where e4m3 means no number."""
    if format == "nvfp4":
        magnitudes = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    elif format == "fp8":
        exponent, fraction = np.divmod(np.arange(128), 8)
        magnitudes = np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10))
    else:
        count = 16 if format == "int4" else 256
        return (np.arange(count) + count // 2) % count - count / 2
    return np.concatenate([magnitudes, -magnitudes])


def decoded(codes: jax.Array, format: str) -> np.ndarray:
    """Codes `[O, ...]` as float64 `[O, I]`."""
    bits = np.asarray(codes).view(np.uint8)
    if CODES[format].bits == 4:
        bits = np.stack([bits % 16, bits // 16], axis=-1).reshape(len(bits), -1)
    return meanings(format)[bits]


def rounded(x: np.ndarray) -> np.ndarray:
    """To bfloat16."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def expected(shape: Shape, arguments: dict[str, Any], layer: int) -> np.ndarray:
    """By the definition, in NumPy and float64; of a weight that is rounded as by the kernel, if it does that."""
    codes = decoded(arguments["codes"][layer], shape.codes).reshape(shape.outputs, shape.groups, -1)
    if shape.zeros:
        codes -= np.asarray(arguments["zeros"][layer]).T[:, :, None]
    scales = np.asarray(arguments["scales"][layer])
    scales = meanings("fp8")[scales.view(np.uint8)] if shape.codes == "nvfp4" else scales.astype(np.float64)
    if arguments["global_scale"] is not None:
        scales = scales * float(arguments["global_scale"][layer])
    scales = scales.T[:, :, None]
    if mosaic_sm90.rounds_weight(shape.form()):
        high = rounded(scales)
        codes = rounded(high * codes + rounded(rounded(scales - high) * codes))
    else:
        codes = codes * scales
    return np.asarray(arguments["x"].astype(jnp.float32), np.float64) @ codes.reshape(shape.outputs, -1).T


def check_shape(shape: Shape, arguments: dict[str, Any]) -> dict[str, Any]:
    """Compares the last layer with NumPy, also with interleaved codes; the layer is traced, three runs must give the
    same bits."""
    call, layer = jax.jit(shape.product("mosaic")), shape.layers - 1
    row: dict[str, Any] = {"shape": shape.name}
    out = call(arguments["x"], jnp.int32(layer), arguments)
    repeats = [call(arguments["x"], jnp.int32(layer), arguments) for _ in range(3)]
    row["bitwise_repeatable"] = all(bool((again == out).all()) for again in repeats)
    right = expected(shape, arguments, layer)
    results = {"error": out}
    if (interleaved := shape.interleaved(arguments)) is not None:  # sums in another order: not the same bits
        product = jax.jit(shape.product("interleaved"))
        results["interleaved_error"] = product(arguments["x"], jnp.int32(layer), interleaved)
    for name, result in results.items():
        error = np.linalg.norm(np.asarray(result.astype(jnp.float32)) - right) / np.linalg.norm(right)
        row[name] = float(error)
    row["limit"] = LIMIT if shape.dtype == "float32" else BFLOAT16_LIMIT
    # A NaN is not below the limit.
    row["passes"] = row["bitwise_repeatable"] and all(row[name] < row["limit"] for name in results)
    return row


def every_code(format: str, rows: int) -> tuple[Shape, dict[str, Any]]:
    """A weight of all codes a format has, with all zeros or scales beside them, in every place of a product.

    Rows of a unit matrix read each weight by itself: it must come out exactly.
    """
    shape = Shape(rows=rows, outputs=256, inputs=128, group_size=-1, scales="float32", zeros=False, layers=1)
    output, place = np.arange(256)[:, None], np.arange(128)[None, :]
    scales = np.ones((1, 1, 256), np.float32)
    if format == "int4":
        shape = dataclasses.replace(shape, group_size=128, zeros=True)
        codes = (output + place) % 16
    elif format == "nvfp4":  # 16 codes by 127 scales, of either sign
        shape = dataclasses.replace(shape, outputs=2032, group_size=16, scales="float8_e4m3fn")
        output = np.arange(2032)[:, None]
        codes = (output // 127 + place) % 16
        scales = (output.T + 5 * np.arange(8)[:, None]) % 127 + 128 * (output.T % 2)
        scales = scales.astype(np.uint8).view(ml_dtypes.float8_e4m3fn)[None]
    else:
        codes = (output + 37 * place) % 256
        codes[(codes % 128 == 127) & (format == "fp8")] = 0
    codes = codes.astype(np.uint8)
    if format in ("int4", "nvfp4"):
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    return dataclasses.replace(shape, codes=format), {
        "x": jnp.eye(rows, 128, dtype=jnp.bfloat16),
        "codes": jnp.asarray(codes.view(CODES[format].dtype))[None],
        "scales": jnp.asarray(scales),
        "zeros": jnp.asarray(output.T // 16 - 8, jnp.int8)[None] if format == "int4" else None,
        "global_scale": jnp.full(1, 0.25, jnp.float32) if format == "nvfp4" else None,
    }


def check_every_code(format: str, rows: int) -> dict[str, Any]:
    """Up to 128 rows are the decode kernel's, more the prefill kernel's."""
    shape, arguments = every_code(format, rows)
    config = mosaic_sm90.PrefillConfig(stages=2) if rows > 128 else None
    out = jax.jit(shape.product(config or "mosaic"))(arguments["x"], jnp.int32(0), arguments)
    wrong = int((np.asarray(out, np.float64) != expected(shape, arguments, 0)).sum())
    return {"codes": every_code_name(format, rows), "wrong": wrong, "passes": wrong == 0}


def every_code_name(format: str, rows: int) -> str:
    return f"every {format} code, M={rows}"


FORMATS = {  # group size, dtype of scales, what activations are rounded to
    "int8": (-1, "float32", None),
    "fp8": (-1, "float32", None),
    "fp8 by block": (128, "float32", None),
    "nvfp4": (16, "float8_e4m3fn", None),
    "int8 by int8": (-1, "float32", "int8"),
    "fp8 by fp8": (-1, "float32", "fp8"),
}


def of_format(name: str, **sizes: Any) -> Shape:
    """A shape of one of the formats that are not int4."""
    group_size, scales, activations = FORMATS[name]
    kind: dict[str, Any] = {"group_size": group_size, "scales": scales, "activations": activations, "zeros": False}
    return Shape(codes=name.split()[0], **kind | sizes)


def check_formats() -> Iterator[Shape]:
    """What `check_shapes` has for int4: both kernels, every kind of call, tiles that are not filled."""
    for name, (*_, activations) in FORMATS.items():
        for rows in (1, 64, 130, 1000):
            yield of_format(name, rows=rows, outputs=1024, inputs=2048)
        for rows in (8, 300):
            if activations is None:
                yield of_format(name, rows=rows, outputs=1024, inputs=2048, dtype="bfloat16")
        for rows, outputs, inputs in ((3, 208, 256), (70, 144, 384), (600, 208, 256)):
            yield of_format(name, rows=rows, outputs=outputs, inputs=inputs, layers=3)
    for name, rows in itertools.product(("int8", "nvfp4"), (5, 520)):  # inputs that are no whole products
        yield of_format(name, rows=rows, outputs=64, inputs=416, layers=3)
    for name, scales, dtype in itertools.product(FORMATS, ("bfloat16", "float16"), ("float32", "bfloat16")):
        if name in ("int8", "fp8", "fp8 by block"):  # as checkpoints have them
            yield of_format(name, rows=8, outputs=1024, inputs=1024, scales=scales, dtype=dtype)
    for group_size in (32, 64, 256):
        yield of_format("int8", rows=8, outputs=1024, inputs=1024, group_size=group_size)
    for name in ("int8", "nvfp4"):
        yield of_format(name, rows=8, outputs=12288, inputs=4096)


def check_shapes() -> Iterator[Shape]:
    """Both kernels, every group size, tiles that outputs and rows do not fill."""
    for rows in (1, 3, 8, 16, 17, 32, 48, 64, 65, 128, 130, 256, 512, 513, 1000, 4096):
        yield Shape(rows=rows)
        yield Shape(rows=rows, dtype="bfloat16", zeros=False)
    for rows in (1, 8, 64, 300, 2048):
        for group_size in (32, 64, 256, -1):
            yield Shape(rows=rows, group_size=group_size)
            yield Shape(rows=rows, group_size=group_size, zeros=False, scales="float32", outputs=1024)
        for outputs, inputs in ((64, 128), (208, 256), (144, 416), (1008, 4096), (1024, 4096), (12288, 4096)):
            yield Shape(rows=rows, outputs=outputs, inputs=inputs, group_size=-1 if inputs == 416 else 128, layers=3)
    yield Shape(rows=8, outputs=28672, inputs=8192)
    yield Shape(rows=8, outputs=4096, inputs=12288)
    grids = itertools.product((32, 64, 128, 256, -1), (True, False), ("float16", "float32"), ("float32", "bfloat16"))
    for group_size, zeros, scales, dtype in grids:  # every kind of call
        for rows in (8, 64, 300):
            yield Shape(rows=rows, outputs=1024, group_size=group_size, zeros=zeros, scales=scales, dtype=dtype)
    yield from check_formats()
    yield from check_prefills()


def check_prefills() -> Iterator[Shape]:
    """Rows from where the prefill kernel begins, most of them odd, with every format and group size."""
    for rows, outputs in ((65, 16384), (129, 8192), (130, 8192), (300, 8192), (513, 1024), (1030, 1024), (2100, 1024)):
        for group_size, zeros in itertools.product((32, 64, 128, 256, -1), (True, False)):
            yield Shape(rows=rows, outputs=outputs, inputs=512, group_size=group_size, zeros=zeros)
        for name, (*_, activations) in FORMATS.items():
            if activations is None:
                yield of_format(name, rows=rows, outputs=outputs, inputs=512)
        for group_size in (32, 64):
            yield of_format("int8", rows=rows, outputs=outputs, inputs=512, group_size=group_size, dtype="bfloat16")


def checks() -> Iterator[tuple[dict[str, str], Callable[[], dict[str, Any]]]]:
    """What a row is about, and how it is made."""
    for format, rows in itertools.product(CODES, (128, 129)):
        yield {"codes": every_code_name(format, rows)}, functools.partial(check_every_code, format, rows)
    for rows, outputs in itertools.product((1, 8, 16, 40, 64), TOGETHER):
        yield {"launch": launch_name(rows, outputs)}, functools.partial(check_together, rows, outputs)
    for shape in check_shapes():
        yield {"shape": shape.name}, lambda shape=shape: check_shape(shape, shape.arguments())


def launch_name(rows: int, outputs: tuple[int, ...]) -> str:
    return f"M={rows} {'+'.join(map(str, outputs))}x4096 together in one launch"


TOGETHER = ((4096, 1024, 1024), (12288, 12288), (1008, 64))  # outputs of weights that one launch multiplies with


def check_together(rows: int, outputs: tuple[int, ...]) -> dict[str, Any]:
    """Several products in one launch, each of activations and a layer of its own, against NumPy."""
    shapes = [Shape(rows=rows, outputs=count) for count in outputs]
    arguments = [shape.arguments(seed) for seed, shape in enumerate(shapes)]

    @jax.jit
    def call(layer, arguments):
        operands = [
            mosaic_sm90.Operands(**{name: given[name] for name in ("x", "codes", "scales", "zeros")}, layer=layer)
            for given in arguments
        ]
        return mosaic_sm90.run_together(operands, group_size=shapes[0].group_size)

    results = call(jnp.int32(1), arguments)
    again = call(jnp.int32(1), arguments)
    rights = [expected(shape, given, 1) for shape, given in zip(shapes, arguments, strict=True)]
    errors = [
        float(np.linalg.norm(np.asarray(result) - right) / np.linalg.norm(right))
        for result, right in zip(results, rights, strict=True)
    ]
    row: dict[str, Any] = {"launch": launch_name(rows, outputs), "errors": errors}
    row["bitwise_repeatable"] = all(bool((a == b).all()) for a, b in zip(results, again, strict=True))
    row["passes"] = row["bitwise_repeatable"] and all(error < LIMIT for error in errors)
    return row


def check(arguments: argparse.Namespace) -> int:
    record, deadline = report.Record("quantized_matmul-check"), time.monotonic() + arguments.seconds
    for about, make in checks():
        if not any(part in name for name in about.values() for part in arguments.filter):
            continue
        if time.monotonic() > deadline:
            print(f"not reached in {arguments.seconds:.0f} s: {about} and what follows", flush=True)
            break
        try:
            row = make()
        except Exception as error:  # one shape that fails is a row, not the end of the check
            row = about | {"failure": f"{type(error).__name__}: {str(error)[:300]}", "passes": False}
        record.add(row)
        values = ", ".join(f"{name} {value}" for name, value in row.items() if name != "passes")
        print(f"{'ok  ' if row['passes'] else 'FAIL'} {values}", flush=True)
    failed = sum(not row["passes"] for row in record.rows)
    print(f"{len(record.rows)} shapes, {failed} failed")
    return 1 if failed or not record.rows else 0


# ---------------------------------------------------------------------------------------------------------------
# Speed


def time_shapes() -> Iterator[Shape]:
    """Linear layers of models of 8 to 70 billion weights, most telling first."""
    sizes = ((4096, 4096), (12288, 4096), (4096, 12288), (28672, 8192), (14336, 4096), (1024, 4096))
    for rows in (1, 8, 16, 32, 64):
        for outputs, inputs in sizes:
            yield Shape(rows=rows, outputs=outputs, inputs=inputs).cold()
    for rows in (4096, 1024, 256, 128):
        for outputs, inputs in sizes[:2]:
            yield Shape(rows=rows, outputs=outputs, inputs=inputs, dtype="bfloat16").cold()
    for group_size, rows in itertools.product((32, 64), (1, 8, 64, 128)):
        for outputs in (4096, 12288, 1024):
            yield Shape(rows=rows, outputs=outputs, group_size=group_size).cold()
    yield Shape(rows=8, outputs=12288, group_size=-1).cold()
    yield Shape(rows=8, outputs=12288, zeros=False).cold()
    for rows, outputs in ((8, 12288), (1, 4096), (64, 12288), (1, 12288), (8, 4096), (1024, 4096)):
        for name in FORMATS:
            yield of_format(name, rows=rows, outputs=outputs, inputs=4096).cold()


def over_layers(shape: Shape, implementation: Any) -> Callable[[dict[str, Any]], Any]:
    """The products with all layers, each of activations that wait for the result before."""
    product = shape.product(implementation)

    @jax.jit
    def run(arguments):
        x = arguments["x"]
        for layer in range(shape.layers):
            # All of the result is made, though one column of it is used.
            result = jax.lax.optimization_barrier(product(x, layer, arguments))
            x = (arguments["x"] + 1e-30 * result[:, :1]).astype(jnp.bfloat16)
        return result

    return run


def dense_layers(shape: Shape) -> list[jax.Array]:
    """Random bfloat16 weights, whose values do not matter."""
    make = jax.jit(lambda key: jax.random.normal(key, (shape.outputs, shape.inputs), jnp.bfloat16))
    return [make(key) for key in jax.random.split(jax.random.key(2), shape.layers)]


def measure(shape: Shape, bandwidth: float, *, peers: bool, sweep: bool) -> dict[str, Any]:
    arguments = shape.arguments()
    record: dict[str, Any] = {"layers": shape.layers, "bytes": shape.bytes()} | check_shape(shape, arguments)
    print(f"  error {record['error']:.2e}, repeatable {record['bitwise_repeatable']}", flush=True)
    if not record["passes"]:
        print("  WRONG, not timed", flush=True)
        return record
    results: dict[str, Any] = {}
    failures: dict[str, str] = {}
    chosen = mosaic_sm90.heuristic_config(shape.form())
    record["config"] = str(chosen)
    interleaved = shape.interleaved(arguments)
    tried: list[Any] = ["mosaic"] if interleaved is None else ["interleaved", "mosaic"]
    tried += ["dense", "xla"] if peers else []
    if sweep:
        tried = [chosen, *(config for config in mosaic_sm90.candidates(shape.form()) if config != chosen)]
    for implementation in tried:
        name = str(implementation)
        try:
            given: Any = interleaved if name == "interleaved" else arguments
            if name == "dense":
                given = {"x": arguments["x"], "dense": dense_layers(shape)}
            call = functools.partial(over_layers(shape, implementation), given)
            row: dict[str, Any] = dict(report.timed(call, repeats=20, warm_up=2))
            profile = report.device_profile(call, calls=3)
        except Exception as error:  # a peer that cannot run a shape is a row of the table, not the end of it
            failures[name] = f"{type(error).__name__}: {str(error)[:300]}"
            print(f"  {name}: {failures[name]}", flush=True)
            continue
        row |= {"device_us": 1e3 * profile["device_ms"] / shape.layers, "operations": profile["operations"]}
        row["kernel_us"] = 1e3 * max(operation["ms"] for operation in profile["operations"]) / shape.layers
        row["wall_us"] = 1e3 * row["median_ms"] / shape.layers
        moved = shape.bytes()
        if name == "dense":
            moved += 2 * shape.outputs * shape.inputs - shape.weight_bytes()
        row["gb_per_second"] = moved / row["device_us"] / 1e3
        row["percent_of_copy"] = 100 * row["gb_per_second"] * 1e9 / bandwidth
        row["tflops"] = 2 * shape.rows * shape.outputs * shape.inputs / row["device_us"] / 1e6
        results[name] = row
        print(
            f"  {name:11s} device {row['device_us']:8.2f} us  kernel {row['kernel_us']:8.2f} us  wall "
            f"{row['wall_us']:8.2f} us  {row['gb_per_second']:6.0f} GB/s {row['percent_of_copy']:5.1f} %  "
            f"{row['tflops']:6.1f} TFLOP/s",
            flush=True,
        )
        del given, call
    return record | {"results": results, "failures": failures, "clocks": report.clocks()}


def run_timing(arguments: argparse.Namespace) -> int:
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    record = report.Record(
        "quantized_matmul-sweep" if arguments.sweep else "quantized_matmul", copy_bytes_per_second=bandwidth
    )
    deadline = time.monotonic() + arguments.seconds
    for shape in time_shapes():
        if time.monotonic() > deadline:
            print(f"not reached in {arguments.seconds:.0f} s: {shape.name} and what follows", flush=True)
            break
        if any(part in shape.name for part in arguments.filter):
            print(f"{shape.name}, {shape.layers} layers", flush=True)
            record.add(measure(shape, bandwidth, peers=not arguments.no_peers, sweep=arguments.sweep))
    return 0 if record.rows and all(row["passes"] for row in record.rows) else 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "time"])
    parser.add_argument("--filter", nargs="+", default=[""], help="only shapes whose name contains one of these")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no new shape is begun after this")
    parser.add_argument("--sweep", action="store_true", help="time every configuration of the kernel, and no peers")
    parser.add_argument("--no-peers", action="store_true", help="time the kernel only")
    arguments = parser.parse_args(argv)
    if (reason := compat.missing_hopper()) is not None:
        print(reason, file=sys.stderr)
        return 2
    return check(arguments) if arguments.what == "check" else run_timing(arguments)


if __name__ == "__main__":
    sys.exit(main())
