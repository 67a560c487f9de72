"""Hopper kernels of products with four-bit weights: `decode.py` for few tokens, `prefill.py` for many.

The weight is `(code - zero) * scale`. Both put `code - zero`, an integer of magnitude 15 at most, into bfloat16 without
rounding, multiply on the tensor core, and scale the float32 products of each group; sums are float32. So nothing is
rounded but the result, when it is asked for in fewer bits. `parts.py` is what they share.

The stack of layers is read where it lies: the layer index is a number in global memory.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Int8, UInt8

from pallas_kernels import compat
from pallas_kernels.quantized_matmul.mosaic_sm90 import decode, prefill
from pallas_kernels.quantized_matmul.mosaic_sm90.decode import Config
from pallas_kernels.quantized_matmul.mosaic_sm90.parts import MAX_WIDTH, Form, Operands, fitted, form_of, input_order
from pallas_kernels.quantized_matmul.mosaic_sm90.prefill import PrefillConfig

__all__ = [
    "MAX_ROWS_TOGETHER",
    "Config",
    "Form",
    "Operands",
    "PrefillConfig",
    "candidates",
    "compile_cases",
    "heuristic_config",
    "order_of",
    "run",
    "run_together",
    "unsupported",
]

SCALES = ("float16", "float32")
RESULTS = ("float32", "bfloat16")
SMALL_GROUPS = (32, 64)
OUTPUTS = 16
MAX_ROWS_TOGETHER = 64  # of products in one launch; with more, each fills the machine by itself


def heuristic_config(form: Form) -> Config | PrefillConfig:
    """The prefill kernel where its tiles fill the machine, or partial results of so many tokens would cost more."""
    config = PrefillConfig(stages=4)
    tiles = -(-form.rows // config.block_m) * -(-form.outputs // prefill.BLOCK_O)
    if form.rows > 512 or (form.rows > 64 and tiles >= 128):
        return fitted(config, form)
    return decode.heuristic_config((form,))


def unsupported(
    x: Any,
    codes: Any,
    scales: Any,
    zeros: Any,
    layer: Any,
    *,
    group_size: int,
    config: Config | PrefillConfig | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
    dtype: Any = jnp.float32,
) -> str | None:
    """Why this call cannot run here, in words; None when it can. Takes what `run` takes."""
    del layer, config
    if (reason := _unsupported_arrays(x, codes, scales, zeros, group_size, dtype)) is not None:
        return reason
    return None if interpret is not None else compat.missing_hopper()


def _unsupported_arrays(x: Any, codes: Any, scales: Any, zeros: Any, group_size: int, dtype: Any) -> str | None:
    inputs, groups = x.shape[-1], scales.shape[-2]
    if str(x.dtype) != "bfloat16":
        return f"needs bfloat16 activations; got {x.dtype}"
    if str(jnp.dtype(dtype)) not in RESULTS:
        return f"gives float32 or bfloat16 results; asked for {jnp.dtype(dtype)}"
    if str(scales.dtype) not in SCALES:
        return f"needs scales in {SCALES}; got {scales.dtype}"
    if str(codes.dtype) != "uint8" or 2 * codes.shape[-1] != inputs:
        return f"needs uint8 codes of {inputs} inputs, two to a byte; got {codes.dtype} {tuple(codes.shape)}"
    if zeros is not None and str(zeros.dtype) != "int8":
        return f"needs int8 zeros; got {zeros.dtype}"
    if codes.shape[-2] % OUTPUTS:  # copies of scales and zeros of one group begin and end at whole 16 bytes
        return f"needs a multiple of {OUTPUTS} outputs; got {codes.shape[-2]}"
    if inputs % 32:
        return f"needs a multiple of 32 inputs; got {inputs}"
    size = inputs if group_size == -1 else group_size
    if size * groups != inputs:
        return f"needs {inputs} inputs in whole groups of {size}; got scales of {groups} groups"
    if groups > 1 and size not in SMALL_GROUPS and size % MAX_WIDTH:
        return f"needs groups of {SMALL_GROUPS}, a multiple of {MAX_WIDTH} or all inputs; got {size}"
    return None


def run(
    x: Float[Array, "M I"],
    codes: UInt8[Array, "L O half"],
    scales: Float[Array, "L G O"],
    zeros: Int8[Array, "L G O"] | None,
    layer: Int[Array, ""] | int,
    *,
    group_size: int,
    config: Config | PrefillConfig | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
    dtype: Any = jnp.float32,
) -> Float[Array, "M O"]:
    """`x @ W[layer].T`, W the `(codes - zeros) * scales` of each output and group of inputs.

    Args:
      x: bfloat16.
      codes: signed, two to a byte, that of the even input in the low bits.
      scales: float16 or float32, of the G groups.
      zeros: codes that stand for 0; None: 0.
      layer: index of the weight; one outside is taken for the nearest.
      group_size: inputs of a group; -1: all.
      config: of the decode or of the prefill kernel; None: by the shape.
      interpret: runs the kernel on the CPU, for tests.
      dtype: of the result, float32 or bfloat16.

    Raises:
      NotImplementedError: shapes or dtypes that the kernels do not take.
      ValueError: `config` needs more shared memory than a CTA has.
    """
    operands = (Operands(x, codes, scales, zeros, layer),)
    (result,) = run_together(operands, group_size=group_size, config=config, interpret=interpret, dtype=dtype)
    return result


def run_together(
    operands: Sequence[Operands],
    *,
    group_size: int,
    config: Config | PrefillConfig | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
    dtype: Any = jnp.float32,
    is_ordered: bool = False,
) -> tuple[Float[Array, "M O"], ...]:
    """`run` of several products with as many rows and inputs and weights of one kind; of up to 64 rows in one launch.

    `is_ordered` says that inputs are in the order of `order_of` already.

    Raises:
      NotImplementedError, ValueError: as `run`; and if the products differ in more than outputs and layers.
    """
    for x, codes, scales, zeros, _ in operands:
        if (reason := _unsupported_arrays(x, codes, scales, zeros, group_size, dtype)) is not None:
            raise NotImplementedError(f"quantized_matmul on Hopper {reason}")
    forms = tuple(form_of(*of_weight[:-1], dtype, is_ordered) for of_weight in operands)
    first = forms[0]
    if any(form._replace(outputs=first.outputs, layers=first.layers) != first for form in forms):
        raise ValueError(f"products of one launch must differ in outputs and layers alone; got {forms}")
    if first.rows == 0:
        return tuple(jnp.zeros((0, form.outputs), dtype) for form in forms)
    if len(forms) > 1 and (first.rows > MAX_ROWS_TOGETHER or isinstance(config, PrefillConfig)):
        options: dict[str, Any] = {"group_size": group_size, "config": config, "interpret": interpret, "dtype": dtype}
        return tuple(run_together((of_weight,), **options, is_ordered=is_ordered)[0] for of_weight in operands)
    if config is None:
        config = heuristic_config(first) if len(forms) == 1 else decode.heuristic_config(forms)
    if (needed := config.smem_bytes(first)) > compat.SHARED_MEMORY_BYTES:
        raise ValueError(
            f"{config} needs {needed} bytes of shared memory for {first.rows} rows; "
            f"a CTA has {compat.SHARED_MEMORY_BYTES}"
        )
    operands = tuple(of_weight._replace(layer=jnp.asarray(of_weight.layer, jnp.int32)) for of_weight in operands)
    if isinstance(config, PrefillConfig):
        return (prefill.run(*operands[0], form=first, config=config, interpret=interpret),)
    return decode.run(operands, forms=forms, config=config, interpret=interpret)


def order_of(group_size: int) -> tuple[int, ...] | None:
    """The order in which the kernels want the inputs of a group, for who makes them anyway; None if they have none."""
    width = min(group_size, MAX_WIDTH)
    if group_size % width or width not in (*SMALL_GROUPS, MAX_WIDTH):
        return None
    return tuple(first + i for first in range(0, group_size, width) for i in input_order(width))


def candidates(form: Form) -> Iterator[Config | PrefillConfig]:
    """The configurations that a benchmark may try."""
    tokens = decode.tokens_of(form)
    made: list[Config | PrefillConfig] = []
    if form.rows <= 512:
        for warpgroups, block_k, cluster, stages in itertools.product((4, 2), (256, 128), (1, 2), (8, 6, 4, 3)):
            if warpgroups == 2 or tokens <= 64:
                made.append(Config(warpgroups=warpgroups, block_k=block_k, cluster=cluster, stages=stages))
    if form.rows > 64:
        for block_m, cluster, stages in itertools.product((128, 64), (1, 2, 4), (4, 3)):
            made.append(PrefillConfig(block_m=block_m, cluster=cluster, stages=stages))
    return (config for config in made if config.smem_bytes(form) <= compat.SHARED_MEMORY_BYTES)


def compile_cases() -> Iterator[Any]:
    """What the compile gate compiles: numbers of tokens, groups with and without zeros, and both kernels."""
    from pallas_kernels.compile_gate import CompileCase

    # M, I, O, group size, zeros, dtype of scales, dtype of results
    forms = [
        *((m, 4096, 4096, 128, True, "float16", "float32") for m in (1, 16, 32, 48, 64, 128)),
        (8, 4096, 12288, 128, False, "float16", "float32"),
        (64, 4096, 12288, 128, True, "float16", "float32"),
        (64, 4096, 4096, 128, False, "float32", "float32"),
        *((m, 4096, 4096, g, True, "float16", "float32") for m in (8, 64) for g in (32, 64, -1)),
        *((4096, 4096, 4096, 128, zeros, "float16", dtype) for zeros in (True, False) for dtype in RESULTS),
        *((4096, 4096, 4096, g, True, "float32", "bfloat16") for g in (32, 64, -1)),
    ]
    cases: list[tuple[Any, ...]] = [(*form, None) for form in forms]
    for rows in (8, 32, 64, 128):  # what else a benchmark may try; stages make no difference to the compiler
        arguments = (rows, 4096, 4096, 128, True, "float16", "float32")
        shape = Form(rows, 4096, 4096, 4, 32, jnp.dtype("float16"), True, jnp.dtype("float32"))
        cases += [(*arguments, config) for config in candidates(shape) if config.stages == 3]
    layers, array = 4, jax.ShapeDtypeStruct
    for rows, inputs, outputs, group_size, has_zeros, scale_dtype, dtype, config in cases:

        def call(x, codes, scales, layer, *zeros, group_size=group_size, dtype=dtype, config=config):
            parts = (x, codes, scales, *(zeros or (None,)), layer)
            return run(*parts, group_size=group_size, dtype=dtype, config=config)

        grid = (layers, 1 if group_size == -1 else inputs // group_size, outputs)
        name = f"w4a16 M={rows} {outputs}x{inputs} groups of {group_size} {scale_dtype}"
        name = f"{name}{' zeros' if has_zeros else ''} to {dtype}"
        yield CompileCase(
            name=name if config is None else f"{name} {config}",
            function=call,
            avals=(
                array((rows, inputs), jnp.bfloat16),
                array((layers, outputs, inputs // 2), jnp.uint8),
                array(grid, scale_dtype),
                array((), jnp.int32),
                *([array(grid, jnp.int8)] if has_zeros else []),
            ),
            shipped=config is None,
        )
    for rows, outputs in ((1, (4096, 1024, 1024)), (16, (12288, 12288)), (64, (4096, 1024, 1024))):

        def together(x, layer, *weights):
            threes = zip(weights[0::3], weights[1::3], weights[2::3], strict=True)
            operands = [Operands(x, codes, scales, zeros, layer) for codes, scales, zeros in threes]
            return run_together(operands, group_size=128, dtype=jnp.bfloat16)

        of_weights = []
        for count in outputs:
            of_weights.append(array((layers, count, 2048), jnp.uint8))
            of_weights += [array((layers, 32, count), dtype) for dtype in (jnp.float16, jnp.int8)]
        yield CompileCase(
            name=f"w4a16 M={rows} {'+'.join(map(str, outputs))}x4096 groups of 128 float16 zeros to bfloat16",
            function=together,
            avals=(array((rows, 4096), jnp.bfloat16), array((), jnp.int32), *of_weights),
        )
