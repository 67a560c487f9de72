"""Hopper kernels of products with weights of four or eight bits: `decode.py` for few tokens, `prefill.py` for many.

Both put codes, int4 less their zeros and nvfp4 times the scales of their blocks, into bfloat16 without rounding,
multiply on the tensor core, and scale float32 sums with the one scale of an output. Scales of groups meet the sums of
each group in `decode.py`, so that nothing is rounded but the result, when it is asked for in fewer bits; in
`prefill.py` they meet the codes, and the weight is rounded to bfloat16 as XLA's is. `parts.py` is what the kernels
share, `codes.py` what differs between formats.

The stack of layers is read where it lies: the layer index is a number in global memory.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Int8

from pallas_kernels import compat
from pallas_kernels.partial import Partial
from pallas_kernels.quantized_matmul.mosaic_sm90 import decode, prefill
from pallas_kernels.quantized_matmul.mosaic_sm90.codes import CODES
from pallas_kernels.quantized_matmul.mosaic_sm90.decode import Config
from pallas_kernels.quantized_matmul.mosaic_sm90.parts import Form, Operands, form_of
from pallas_kernels.quantized_matmul.mosaic_sm90.prefill import PrefillConfig
from pallas_kernels.quantized_matmul.order import MAX_WIDTH

__all__ = [
    "MAX_ROWS_TOGETHER",
    "OUTPUTS",
    "Config",
    "Form",
    "Operands",
    "PrefillConfig",
    "candidates",
    "compile_cases",
    "heuristic_config",
    "rounds_weight",
    "run",
    "run_together",
    "unit_of_inputs",
    "unsupported",
]

RESULTS = ("float32", "bfloat16")
SMALL_GROUPS = (32, 64)
OUTPUTS = 16
MAX_ROWS_TOGETHER = 64  # of products in one launch; with more, each fills the machine by itself


def heuristic_config(form: Form) -> Config | PrefillConfig:
    """The prefill kernel where its tiles fill the machine, or partial results of so many tokens would cost more."""
    tiles = -(-form.rows // 128) * -(-form.outputs // prefill.BLOCK_O)
    if form.rows > 512 or (form.rows > 64 and tiles >= 128):
        return prefill.heuristic_config(form)
    return decode.heuristic_config((form,))


def rounds_weight(form: Form, config: Config | PrefillConfig | None = None) -> bool:
    """Whether the weight is rounded to bfloat16 before it is multiplied with: where its groups' scales meet codes.

    `config` as in `run`.
    """
    return form.scales_groups and isinstance(config or heuristic_config(form), PrefillConfig)


def unsupported(
    x: Any,
    codes: Any,
    scales: Any,
    zeros: Any,
    layer: Any,
    *,
    group_size: int,
    format: str = "int4",
    global_scale: Any = None,
    config: Config | PrefillConfig | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
    dtype: Any = jnp.float32,
) -> str | None:
    """Why this call cannot run here, in words; None when it can. Takes what `run` takes."""
    del config
    operands = Operands(x, codes, scales, zeros, layer, global_scale)
    if (reason := _unsupported_arrays(operands, group_size, format, dtype)) is not None:
        return reason
    return None if interpret is not None else compat.missing_hopper()


def _unsupported_arrays(operands: Operands, group_size: int, format: str, dtype: Any) -> str | None:
    x, codes, scales, zeros, _, global_scale = operands
    inputs, groups = x.shape[-1], scales.shape[-2]
    if format not in CODES:
        return f"knows codes of {[*CODES]}; got {format!r}"
    known = CODES[format]
    if str(x.dtype) != "bfloat16":
        return f"needs bfloat16 activations; got {x.dtype}"
    if str(jnp.dtype(dtype)) not in RESULTS:
        return f"gives float32 or bfloat16 results; asked for {jnp.dtype(dtype)}"
    if str(scales.dtype) not in known.scales:
        return f"needs {format} scales in {known.scales}; got {scales.dtype}"
    if codes.dtype != known.dtype or codes.shape[-1] != known.bytes(inputs):
        packed = f"{inputs} inputs{', two to a byte' if known.bits == 4 else ''}"
        return f"needs {jnp.dtype(known.dtype)} codes of {packed}; got {codes.dtype} {tuple(codes.shape)}"
    if zeros is not None and (str(zeros.dtype) != "int8" or format != "int4"):
        return f"needs int8 zeros; got {zeros.dtype}" if format == "int4" else f"knows no zeros of {format} codes"
    if global_scale is not None and str(global_scale.dtype) != "float32":
        return f"needs a float32 scale of all weights; got {global_scale.dtype}"
    if codes.shape[-2] % OUTPUTS:  # copies of scales and zeros of one group begin and end at whole 16 bytes
        return f"needs a multiple of {OUTPUTS} outputs; got {codes.shape[-2]}"
    if inputs % (unit := 16 * 8 // known.bits):  # rows of codes do
        return f"needs a multiple of {unit} inputs; got {inputs}"
    size = inputs if group_size == -1 else group_size
    if size * groups != inputs:
        return f"needs {inputs} inputs in whole groups of {size}; got scales of {groups} groups"
    if known.block is not None:
        return None if size == known.block else f"needs {format} scales of {known.block} inputs; got {size}"
    if groups > 1 and size not in SMALL_GROUPS and size % MAX_WIDTH:
        return f"needs groups of {SMALL_GROUPS}, a multiple of {MAX_WIDTH} or all inputs; got {size}"
    return None


def run(
    x: Float[Array, "M I"],
    codes: Array,
    scales: Float[Array, "L G O"],
    zeros: Int8[Array, "L G O"] | None,
    layer: Int[Array, ""] | int,
    *,
    group_size: int,
    format: str = "int4",
    global_scale: Float[Array, "L"] | None = None,
    config: Config | PrefillConfig | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
    dtype: Any = jnp.float32,
) -> Float[Array, "M O"]:
    """`x @ W[layer].T`, W the `(codes - zeros) * scales * global_scale` of each output and group of inputs.

    Args:
      x: bfloat16.
      codes: `[L, O, I]`, or `[L, O, I / 2]` of four bits, as a `QuantizedTensor` has them.
      scales: of the G groups; float8_e4m3fn for nvfp4, float32, bfloat16 or float16 for the others.
      zeros: int4 codes that stand for 0; None: 0.
      layer: index of the weight; one outside is taken for the nearest.
      group_size: inputs of a group; -1: all.
      format: of the codes.
      global_scale: None: 1.
      config: of the decode or of the prefill kernel; None: by the shape.
      interpret: runs the kernel on the CPU, for tests.
      dtype: of the result, float32 or bfloat16.

    Raises:
      NotImplementedError: shapes or dtypes that the kernels do not take.
      ValueError: `config` needs more shared memory than a CTA has.
    """
    operands = (Operands(x, codes, scales, zeros, layer, global_scale),)
    options: dict[str, Any] = {"group_size": group_size, "format": format, "config": config, "dtype": dtype}
    (result,) = run_together(operands, **options, interpret=interpret)
    assert not isinstance(result, Partial)  # merged
    return result


def run_together(
    operands: Sequence[Operands],
    *,
    group_size: int,
    format: str = "int4",
    config: Config | PrefillConfig | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
    dtype: Any = jnp.float32,
    interleaved: bool = False,
    merged: bool = True,
) -> tuple[Float[Array, "M O"] | Partial, ...]:
    """`run` of several products with as many rows and inputs and weights of one kind; of up to 64 rows in one launch.

    `interleaved` says how the codes of all of them lie; see `QuantizedTensor`. Not `merged`, a result of which the
    decode kernel has equally many parts everywhere is left to its reader.

    Raises:
      NotImplementedError, ValueError: as `run`; and if the products differ in more than outputs and layers.
    """
    for of_weight in operands:
        if (reason := _unsupported_arrays(of_weight, group_size, format, dtype)) is not None:
            raise NotImplementedError(f"quantized_matmul on Hopper {reason}")
    forms = tuple(form_of(of_weight, format, dtype, interleaved) for of_weight in operands)
    first = forms[0]
    if any(form._replace(outputs=first.outputs, layers=first.layers) != first for form in forms):
        raise ValueError(f"products of one launch must differ in outputs and layers alone; got {forms}")
    if first.rows == 0:
        return tuple(jnp.zeros((0, form.outputs), dtype) for form in forms)
    if len(forms) > 1 and (first.rows > MAX_ROWS_TOGETHER or isinstance(config, PrefillConfig)):
        options: dict[str, Any] = {"group_size": group_size, "format": format, "config": config, "dtype": dtype}
        options |= {"interpret": interpret, "interleaved": interleaved}
        return tuple(run_together((of_weight,), **options)[0] for of_weight in operands)
    if config is None:
        config = heuristic_config(first) if len(forms) == 1 else decode.heuristic_config(forms)
    if isinstance(config, Config) and not first.takes(config.block_k):
        raise ValueError(f"groups of {first.group_size} inputs need steps of {MAX_WIDTH}; got {config}")
    if (needed := config.smem_bytes(first)) > compat.SHARED_MEMORY_BYTES:
        raise ValueError(
            f"{config} needs {needed} bytes of shared memory for {first.rows} rows; "
            f"a CTA has {compat.SHARED_MEMORY_BYTES}"
        )
    operands = tuple(of_weight._replace(layer=jnp.asarray(of_weight.layer, jnp.int32)) for of_weight in operands)
    if isinstance(config, PrefillConfig):
        return (prefill.run(operands[0], form=first, config=config, interpret=interpret),)
    return decode.run(operands, forms=forms, config=config, interpret=interpret, merged=merged)


def unit_of_inputs(inputs: int, groups: int, format: str, *, interleaved: bool) -> int:
    """Of how many inputs the parts are that a weight may be divided into, so that the kernels take each of them.

    Groups stay whole, and rows of codes begin at whole 16 bytes. A part of interleaved codes has whole products of
    `MAX_WIDTH` inputs: one small group alone would be read in another order than several.
    """
    size = inputs // groups if groups > 1 else 1
    unit = math.lcm(size, MAX_WIDTH if interleaved else 16 * 8 // CODES[format].bits)
    return unit if inputs % unit == 0 else inputs


def candidates(form: Form) -> Iterator[Config | PrefillConfig]:
    """The configurations that a benchmark may try."""
    tokens = decode.tokens_of(form)
    made: list[Config | PrefillConfig] = []
    if form.rows <= 512:
        for warpgroups, block_k, cluster, stages in itertools.product((4, 2), (256, 128), (1, 2), (8, 6, 4, 3)):
            if form.takes(block_k) and (warpgroups == 2 or tokens <= 64):
                made.append(Config(warpgroups=warpgroups, block_k=block_k, cluster=cluster, stages=stages))
    if form.rows > 64:
        for block_m, cluster, stages in itertools.product((256, 192, 128), (1, 2, 4), (4, 3)):
            made.append(PrefillConfig(block_m=block_m, cluster=cluster, stages=stages, code_stages=2))
    return (config for config in made if config.smem_bytes(form) <= compat.SHARED_MEMORY_BYTES)


def compile_cases() -> Iterator[Any]:
    """What the compile gate compiles: formats, numbers of tokens, groups with and without zeros, and both kernels."""
    # Rows, inputs, outputs, group size, zeros, dtype of scales, dtype of results
    forms = [
        *((m, 4096, 4096, 128, True, "float16", "float32") for m in (1, 16, 32, 48, 64, 128)),
        (8, 4096, 12288, 128, False, "float16", "float32"),
        (64, 4096, 12288, 128, True, "float16", "float32"),
        (64, 4096, 4096, 128, False, "float32", "float32"),
        *((m, 4096, 4096, g, True, "float16", "float32") for m in (8, 64) for g in (32, 64, -1)),
        *((4096, 4096, 4096, 128, zeros, "float16", dtype) for zeros in (True, False) for dtype in RESULTS),
        *((4096, 4096, 4096, g, True, "float32", "bfloat16") for g in (32, 64, -1)),
    ]
    for form in forms:
        yield _compile_case("int4", *form)
    for rows in (8, 32, 64, 128):  # what else a benchmark may try; stages make no difference to the compiler
        shape = Form(rows, 4096, 4096, 4, 32, jnp.dtype("float16"), True, jnp.dtype("float32"))
        for config in candidates(shape):
            if config.stages == 3:
                yield _compile_case("int4", rows, 4096, 4096, 128, True, "float16", "float32", config)
    kinds = [("int8", -1, "float32"), ("fp8", -1, "float32"), ("fp8", 128, "float32"), ("nvfp4", 16, "float8_e4m3fn")]
    for format, group_size, scale_dtype in kinds:
        for rows in (1, 16, 32, 64, 128, 4096):
            dtype = "bfloat16" if rows == 4096 else "float32"
            yield _compile_case(format, rows, 4096, 4096, group_size, False, scale_dtype, dtype)
    yield _compile_case("int8", 16, 4096, 4096, 32, False, "bfloat16", "float32")
    yield _compile_case("nvfp4", 64, 4096, 4112, 16, False, "float8_e4m3fn", "bfloat16")
    yield _compile_case("int8", 4096, 4096, 4112, -1, False, "float16", "float32")
    for rows, counts in ((1, (4096, 1024, 1024)), (16, (12288, 12288)), (64, (4096, 1024, 1024))):
        yield _compile_case("int4", rows, 4096, counts, 128, True, "float16", "bfloat16")
    for format, group_size, scale_dtype in kinds:
        yield _compile_case(format, 16, 4096, (4096, 1024, 1024), group_size, False, scale_dtype, "bfloat16")


def _compile_case(
    format: str,
    rows: int,
    inputs: int,
    outputs: int | tuple[int, ...],
    group_size: int,
    has_zeros: bool,
    scale_dtype: str,
    dtype: str,
    config: Config | PrefillConfig | None = None,
) -> Any:
    from pallas_kernels.compile_gate import CompileCase

    codes, layers, array = CODES[format], 4, jax.ShapeDtypeStruct
    counts = (outputs,) if isinstance(outputs, int) else outputs
    x, layer = array((rows, inputs), jnp.bfloat16), array((), jnp.int32)
    of_weights: list[Any] = []
    for count in counts:
        grid = (layers, 1 if group_size == -1 else inputs // group_size, count)
        zeros = array(grid, jnp.int8) if has_zeros else None
        arrays = (array((layers, count, codes.bytes(inputs)), codes.dtype), array(grid, scale_dtype), zeros)
        of_weights.append((*arrays, array((layers,), jnp.float32) if codes.block is not None else None))

    def call(x, layer, *of_weights):
        operands = [Operands(x, codes, scales, zeros, layer, overall) for codes, scales, zeros, overall in of_weights]
        options: dict[str, Any] = {"group_size": group_size, "format": format, "dtype": dtype, "config": config}
        return run_together(operands, **options)

    kind = {"int4": "w4a16", "nvfp4": "nvfp4"}.get(format, f"w8a16 {format}")
    name = f"{kind} M={rows} {'+'.join(map(str, counts))}x{inputs} groups of {group_size} {scale_dtype}"
    name = f"{name}{' zeros' if has_zeros else ''} to {dtype}"
    return CompileCase(
        name=name if config is None else f"{name} {config}",
        function=call,
        avals=(x, layer, *of_weights),
        shipped=config is None,
    )
