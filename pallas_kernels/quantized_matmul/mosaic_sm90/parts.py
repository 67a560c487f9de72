"""What both kernels share: the form of a call, and a tile of codes turned into an operand of the tensor core.

Letters as in `tensor.py`, and M rows of activations.

A tile of codes is 64 outputs of `width` inputs, all of one group, in shared memory in the order of global memory: two
codes to a byte. A thread reads `width / 32` words of eight codes for each of its two rows. Of a word it takes the
codes 0 and 4, 1 and 5, 2 and 6, 3 and 7 at once: shift, mask and flip their bits into the mantissas of two bfloat16
numbers of exponent 7, which are then 128 + 8 + code, and subtract 128 + 8 + zero. That is one LOP3 and one
subtraction for two weights, three shifts for eight, and exact: codes minus zeros are integers of magnitude 15 at most.

The layout of wgmma wants neighbouring columns in a register and the columns of a thread spread over the row. Instead
of moving weights between threads the columns of the activations are put into the order in which the threads hold the
weights (`permuted`): a sum over inputs does not depend on their order.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array

from pallas_kernels import compat

ROWS = 64  # outputs of one compute warpgroup
MAX_WIDTH = 128  # inputs of one product

WGMMA = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)  # one value per row of an accumulator


class Form(NamedTuple):
    """What is static about a call."""

    rows: int
    inputs: int
    outputs: int
    layers: int
    groups: int
    scale_dtype: Any
    has_zeros: bool
    dtype: Any  # of the result
    is_ordered: bool = False  # activations are in the order of `permuted`

    @property
    def group_size(self) -> int:
        return self.inputs // self.groups

    @property
    def width(self) -> int:
        """Inputs of one product: of one group."""
        return min(self.group_size, MAX_WIDTH) if self.groups > 1 else MAX_WIDTH

    def steps(self, block_k: int) -> int:
        """Of `block_k` inputs."""
        return -(-self.inputs // block_k)


class Operands(NamedTuple):
    """The arrays of one product; see `run`."""

    x: Any
    codes: Any
    scales: Any
    zeros: Any
    layer: Any


def form_of(x: Any, codes: Any, scales: Any, zeros: Any, dtype: Any = jnp.float32, is_ordered: bool = False) -> Form:
    return Form(
        rows=x.shape[0],
        inputs=x.shape[1],
        outputs=codes.shape[1],
        layers=codes.shape[0],
        groups=scales.shape[1],
        scale_dtype=jnp.dtype(scales.dtype),
        has_zeros=zeros is not None,
        dtype=jnp.dtype(dtype),
        is_ordered=is_ordered,
    )


def permuted(x: Array, form: Form) -> Array:
    """Activations in the order in which threads hold the weights; inputs in whole products, 8 rows or more in eights.

    The TMA fills fewer rows itself.
    """
    rows, inputs = form.rows if form.rows < 8 else whole(form.rows, 8), whole(form.inputs, form.width)
    if x.shape != (rows, inputs):
        x = jnp.pad(x, ((0, rows - form.rows), (0, inputs - form.inputs)))
    if form.is_ordered:
        return x
    # Threads of a row, their words, high or low half of a word, code in it.
    x = x.reshape(rows, -1, *_threads_words_codes(form.width))
    return jnp.transpose(x, (0, 1, *(2 + axis for axis in _ORDER))).reshape(rows, inputs)


def input_order(width: int) -> tuple[int, ...]:
    """The input at each place of a product of `width` inputs, as `permuted` has them."""
    inputs = np.arange(width).reshape(_threads_words_codes(width))
    return tuple(inputs.transpose(_ORDER).ravel().tolist())


def _threads_words_codes(width: int) -> tuple[int, int, int, int]:
    return 4, width // 32, 2, 4


_ORDER = (1, 3, 0, 2)  # words, codes, threads, halves


def buffers(form: Form, *, stages: int, block_k: int, outputs: int, tokens: int, cluster: int) -> dict[str, Any]:
    """The ring of steps: codes, and for each product activations, scales and zeros."""
    ring = (stages, block_k // form.width)
    lines = {"scales": form.scale_dtype} | ({"zeros": jnp.int8} if form.has_zeros else {})
    return {
        "codes": plgpu.SMEM((stages, outputs, block_k // 2), jnp.uint8),
        "x": plgpu.SMEM(
            (*ring, tokens, form.width), jnp.bfloat16, transforms=compat.swizzled(jnp.bfloat16, form.width)
        ),
        **{name: plgpu.SMEM((*ring, outputs), dtype) for name, dtype in lines.items()},
        "ready": plgpu.Barrier(num_arrivals=1 + ring[1] * (1 + len(lines)), num_barriers=stages),
        "free": _free(outputs // ROWS, stages, cluster),
    }


def _free(warpgroups: int, stages: int, cluster: int) -> Any:
    """Told by the warpgroups of all CTAs that a load goes to."""
    if cluster == 1:
        return plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages)
    return plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=warpgroups, num_barriers=stages)


def cluster_options(cluster: int) -> dict[str, Any]:
    """Of the kernel."""
    return {"cluster": (cluster,), "cluster_names": ("cluster",)} if cluster > 1 else {}


def result_buffer(warpgroups: int, tokens: int, dtype: Any) -> Any:
    return plgpu.SMEM((warpgroups, tokens, ROWS), dtype, transforms=compat.swizzled(dtype, ROWS))


def result_shape(form: Form) -> tuple[int, int]:
    """Of the array in global memory: M and O in whole tiles of the buffer, which the TMA wants."""
    return whole(form.rows, 8), whole(form.outputs, ROWS)


def store(acc: Array, result_ref: Any, out_ref: Any) -> None:
    """Writes `acc [64, tokens]`, transposed, to `[tokens, 64]` in global memory through its buffer."""
    acc = acc.astype(result_ref.dtype)
    result_ref.transpose((1, 0))[...] = plgpu.layout_cast(acc, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(result_ref, out_ref)
    plgpu.wait_smem_to_gmem(0)


def load_step(
    refs: dict, smem: dict, form: Form, *, step: Any, slot: Any, output: Any, token: Any, cluster: int
) -> None:
    """Starts the copies of one step, for the outputs from `output` on and the tokens from `token` on.

    Scales and zeros are read from arrays of one dimension, in which a group begins at whole 16 bytes. What is read
    beyond the last output is of no row that is kept. The CTAs of a cluster load the activations together.
    """
    together: dict[str, Any] = {"collective_axes": "cluster"} if cluster > 1 else {}
    _, subs, outputs = smem["scales"].shape
    tokens = smem["x"].shape[2]
    layer, barrier = jnp.clip(refs["layer"][0], 0, form.layers - 1), smem["ready"].at[slot]
    width = smem["codes"].shape[2]
    codes = refs["codes"].at[layer, pl.ds(output, outputs), pl.ds(step * width, width)]
    plgpu.copy_gmem_to_smem(codes, smem["codes"].at[slot], barrier)
    for sub in range(subs):
        first = step * (subs * form.width) + sub * form.width
        group = jnp.minimum(lax.div(first, jnp.int32(form.group_size)), form.groups - 1)  # beyond the last input: any
        line = pl.ds((layer * form.groups + group) * form.outputs + output, outputs)
        x = refs["x"].at[pl.ds(token, tokens), pl.ds(first, form.width)]
        plgpu.copy_gmem_to_smem(x, smem["x"].at[slot, sub], barrier, **together)
        for name in ("scales", "zeros") if form.has_zeros else ("scales",):
            plgpu.copy_gmem_to_smem(refs[name].at[line], smem[name].at[slot, sub], barrier)


def add_step(acc: Array, smem: dict, form: Form, *, slot: Any, warpgroup: Any, interpreted: bool) -> Array:
    """`acc` and the products of one step that has arrived, for the 64 outputs of a warpgroup."""
    rows = pl.ds(warpgroup * ROWS, ROWS)
    for sub in range(smem["scales"].shape[1]):
        zeros = smem["zeros"].at[slot, sub, rows] if form.has_zeros else None
        weights = _weights(smem["codes"].at[slot, rows], zeros, width=form.width, sub=sub, interpreted=interpreted)
        product = _product(weights, smem["x"].at[slot, sub], interpreted=interpreted)
        scales = plgpu.load(smem["scales"].at[slot, sub, rows], layout=ROW, optimized=False).astype(jnp.float32)
        acc = acc + product * lax.broadcast_in_dim(scales, acc.shape, [0])
    return acc


def _product(weights: Array, x_ref: Any, *, interpreted: bool) -> Array:
    """float32 `[64, tokens]`, of bfloat16 weights `[64, width]` and activations `[tokens, width]`, `permuted`."""
    if interpreted:  # by an interpreter that knows no left operand in registers
        return jnp.dot(weights.astype(jnp.float32), x_ref[...].astype(jnp.float32).T)

    def multiply(acc_ref):
        plgpu.wgmma(acc_ref, weights, x_ref.transpose((1, 0)))
        return acc_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC((ROWS, x_ref.shape[0]), jnp.float32))


def inputs(x: Array, codes: Array, scales: Array, zeros: Array | None, layer: Array, form: Form) -> dict[str, Array]:
    """The kernel's arrays in global memory."""
    arrays = {
        "x": permuted(x, form),
        "codes": codes,
        "scales": scales.reshape(-1),
        "layer": layer.reshape(1),
    }
    return arrays if zeros is None else arrays | {"zeros": zeros.reshape(-1)}


def _weights(codes_ref: Any, zeros_ref: Any, *, width: int, sub: int, interpreted: bool) -> Array:
    """Codes minus zeros of a product, bfloat16 `[64, width]`, the columns in the order of `permuted`.

    Args:
      codes_ref: uint8 `[64, block_k / 2]` in shared memory, of a step.
      zeros_ref: int8 `[64]`, or None.
      width: inputs of the product, all of one group.
      sub: its number in the step.
      interpreted: whether the interpreter runs this.
    """
    rows, stride = codes_ref.shape
    words = width // 32
    if interpreted:
        packed = codes_ref[:, sub * width // 2 : (sub + 1) * width // 2].astype(jnp.int32)
        signed = [(nibble ^ 8) - 8 for nibble in (packed & 15, packed >> 4)]
        weights = jnp.stack(signed, axis=-1).reshape(rows, 4, words, 2, 4)
        weights = jnp.transpose(weights, (0, 2, 4, 1, 3)).reshape(rows, width)
        if zeros_ref is not None:
            weights = weights - zeros_ref[...].astype(jnp.int32)[:, None]
        return weights.astype(jnp.bfloat16)

    result = plgpu.ShapeDtypeStruct((rows, width), jnp.bfloat16, layout=WGMMA)
    arguments = (codes_ref,) if zeros_ref is None else (codes_ref, zeros_ref)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(arguments), return_type=result)
    def convert(ctx, codes_ref, zeros_ref=None):
        del ctx
        i8, i32, bf16 = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(32), ir.BF16Type.get()
        constant = lambda value: mgpu.c(value, i32)  # noqa: E731
        thread = arith.remui(mgpu.thread_idx(), constant(128))
        row = arith.addi(
            arith.muli(arith.divui(thread, constant(32)), constant(16)),
            arith.divui(arith.remui(thread, constant(32)), constant(4)),
        )
        quarter = arith.remui(thread, constant(4))
        codes = mgpu_utils.memref_ptr(codes_ref)
        first = arith.addi(arith.muli(row, constant(stride)), arith.muli(quarter, constant(4 * words)))
        bits = constant(0x43084308)
        # As one instruction it has to be asked for: the compiler makes two of `and` and `xor` with constants.
        ptx = f"""{{
            .reg .b32 t;
            lop3.b32 t, $1, 0x000F000F, $2, {0xF0 & 0xCC ^ 0xAA};
            sub.rn.bf16x2 $0, t, $3;
        }}"""
        registers = np.empty((words * 4, 2), object)
        for half in range(2):
            offset = arith.addi(first, constant(half * 8 * stride + sub * (width // 2)))
            loaded = llvm.load(ir.VectorType.get((words,), i32), _at(codes, offset, i8), alignment=4 * words)
            bias = bits
            if zeros_ref is not None:
                zeros = mgpu_utils.memref_ptr(zeros_ref)
                zero = llvm.load(i8, _at(zeros, arith.addi(row, constant(half * 8)), i8))
                bias = arith.addi(arith.muli(arith.extsi(i32, zero), constant(0x00010001)), bias)
            for word in range(words):
                eight = vector.extract(loaded, dynamic_position=[], static_position=[word])
                for pair in range(4):
                    two = eight if pair == 0 else arith.shrui(eight, constant(4 * pair))
                    numbers = llvm.inline_asm(i32, [two, bits, bias], ptx, "=r,r,r,r")
                    registers[4 * word + pair, half] = llvm.bitcast(ir.VectorType.get((2,), bf16), numbers)
        layout = mgpu.WGMMA_LAYOUT
        return mgpu.FragmentedArray(
            _registers=registers.reshape(layout.registers_shape((rows, width))), _layout=layout, _is_signed=None
        )

    return convert(*arguments)


def _at(pointer: ir.Value, offset: ir.Value, element: ir.Type) -> ir.Value:
    """The address `offset` elements after `pointer`."""
    return mgpu_utils.getelementptr(pointer, [offset], element)


def fitted(config: Any, form: Form) -> Any:
    """The configuration with as many of its stages as fit into shared memory."""
    while config.smem_bytes(form) > compat.SHARED_MEMORY_BYTES:
        config = dataclasses.replace(config, stages=config.stages - 1)
    return config


def whole(size: int, unit: int) -> int:
    """`size` rounded up to units."""
    return math.ceil(size / unit) * unit
