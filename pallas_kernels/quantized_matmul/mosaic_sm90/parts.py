"""What both kernels share: the form of a call, and a tile of codes turned into an operand of the tensor core.

Letters as in `tensor.py`, and M rows of activations.

A tile of codes is 64 outputs of `width` inputs, in shared memory in the order of global memory. A thread reads
`width / 4` codes in a row for each of its two rows, in words of 32 bits; `codes.py` makes bfloat16 numbers of a word.
All inputs of a product share a scale, which its float32 sums meet; or they have scales in blocks of 16, which the codes
meet in registers; or there is one scale per output, which waits for the end, as a scale of all weights does.

The layout of wgmma wants neighbouring columns in a register and the columns of a thread spread over the row. Instead
of moving weights between threads the columns of the activations are put into the order in which the threads hold the
weights (`permuted`): a sum over inputs does not depend on their order.
"""

import dataclasses
import math
from collections.abc import Callable
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
from pallas_kernels.quantized_matmul.mosaic_sm90.codes import CODES, Codes, Instructions, Integers

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
    format: str = "int4"
    has_global_scale: bool = False
    is_ordered: bool = False  # activations are in the order of `permuted`

    @property
    def codes(self) -> Codes:
        return CODES[self.format]

    @property
    def group_size(self) -> int:
        return self.inputs // self.groups

    @property
    def sides(self) -> str | None:
        """Name of the array whose bytes codes meet in registers."""
        if self.codes.block is not None:
            return "scales"
        return "zeros" if self.has_zeros else None

    @property
    def scales_products(self) -> bool:
        """Whether a product's sums meet its scales."""
        return self.groups > 1 and self.codes.block is None

    @property
    def scales_outputs(self) -> bool:
        """Whether the sums of an output meet its one scale at the end."""
        return self.groups == 1 and self.codes.block is None

    @property
    def is_unfinished(self) -> bool:
        """Whether anything is left to do to the sums (`finished`)."""
        return self.scales_outputs or self.has_global_scale or self.codes.factor != 1

    @property
    def width(self) -> int:
        """Inputs of one product: of one group, if sums meet scales."""
        return min(self.group_size, MAX_WIDTH) if self.scales_products else MAX_WIDTH

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
    global_scale: Any = None


def form_of(operands: Operands, format: str, dtype: Any = jnp.float32, is_ordered: bool = False) -> Form:
    x, codes, scales, zeros, _, global_scale = operands
    return Form(
        rows=x.shape[0],
        inputs=x.shape[1],
        outputs=codes.shape[1],
        layers=codes.shape[0],
        groups=scales.shape[1],
        scale_dtype=jnp.dtype(scales.dtype),
        has_zeros=zeros is not None,
        dtype=jnp.dtype(dtype),
        format=format,
        has_global_scale=global_scale is not None,
        is_ordered=is_ordered,
    )


def permuted(x: Array, form: Form) -> Array:
    """Activations in the order in which threads hold the weights; inputs in whole products, rows in whole atoms."""
    rows, inputs = compat.whole_atoms(form.rows), whole(form.inputs, form.width)
    if x.shape != (rows, inputs):
        x = jnp.pad(x, ((0, rows - form.rows), (0, inputs - form.inputs)))
    if form.is_ordered:
        return x
    # A gather: XLA makes it part of what makes the activations, and a transposition a kernel of its own.
    order = jnp.asarray(input_order(form.width, form.codes))
    return x.reshape(rows, -1, form.width)[..., order].reshape(rows, inputs)


def input_order(width: int, codes: Codes) -> tuple[int, ...]:
    """The input at each place of a product of `width` inputs, as `permuted` has them."""
    # Threads of a row, their words, low or high half of a word, code in it; then words, codes, threads, halves.
    inputs = np.arange(width).reshape(4, width // (4 * codes.per_word), 2, codes.per_word // 2)
    return tuple(inputs.transpose(1, 3, 0, 2).ravel().tolist())


def buffers(form: Form, *, stages: int, block_k: int, outputs: int, tokens: int, cluster: int) -> dict[str, Any]:
    """The ring of steps: codes, and for each product activations, scales and zeros, as far as it needs them."""
    ring, codes = (stages, block_k // form.width), form.codes
    lines: dict[str, Any] = {}
    if form.scales_products:
        lines["scales"] = plgpu.SMEM((*ring, outputs), form.scale_dtype)
    elif codes.block is not None:
        lines["scales"] = plgpu.SMEM((*ring, form.width // codes.block, outputs), form.scale_dtype)
    if form.has_zeros:
        lines["zeros"] = plgpu.SMEM((*ring, outputs), jnp.int8)
    return {
        "codes": plgpu.SMEM((stages, outputs, codes.bytes(block_k)), codes.dtype),
        "x": plgpu.SMEM(
            (*ring, tokens, form.width), jnp.bfloat16, transforms=compat.swizzled(jnp.bfloat16, form.width)
        ),
        **lines,
        "ready": plgpu.Barrier(num_arrivals=1 + ring[1] * (1 + len(lines)), num_barriers=stages),
        "free": _free(outputs // ROWS, stages, cluster),
    }


def _free(warpgroups: int, stages: int, cluster: int) -> Any:
    """Told by the warpgroups of all CTAs that a load goes to."""
    if cluster == 1:
        return plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages)
    return plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=warpgroups, num_barriers=stages)


def release(barrier: Any, cluster: int) -> None:
    """Tells the loads of all CTAs of a cluster that the warpgroup has read a slot."""
    if cluster > 1:
        plgpu.commit_smem()  # one thread arrives for all of the warpgroup, which must have read the slot by then
    plgpu.barrier_arrive(barrier)


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
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the buffer is free; what is written is there when the kernel ends


def load_step(
    refs: dict, smem: dict, form: Form, *, step: Any, slot: Any, output: Any, token: Any, cluster: int
) -> None:
    """Starts the copies of one step, for the outputs from `output` on and the tokens from `token` on.

    Scales and zeros of products are read from arrays of one dimension, in which a group begins at whole 16 bytes. What
    is read beyond the last output is of no row that is kept; scales in blocks beyond the last input are 0. The CTAs of
    a cluster load the activations together.
    """
    together: dict[str, Any] = {"collective_axes": "cluster"} if cluster > 1 else {}
    _, subs, tokens, _ = smem["x"].shape
    _, outputs, width = smem["codes"].shape
    layer, barrier = _layer(refs, form), smem["ready"].at[slot]
    codes = refs["codes"].at[layer, pl.ds(output, outputs), pl.ds(step * width, width)]
    plgpu.copy_gmem_to_smem(codes, smem["codes"].at[slot], barrier)
    for sub in range(subs):
        first = step * (subs * form.width) + sub * form.width
        group = jnp.minimum(lax.div(first, jnp.int32(form.group_size)), form.groups - 1)  # beyond the last input: any
        line = pl.ds((layer * form.groups + group) * form.outputs + output, outputs)
        x = refs["x"].at[pl.ds(token, tokens), pl.ds(first, form.width)]
        plgpu.copy_gmem_to_smem(x, smem["x"].at[slot, sub], barrier, **together)
        if form.codes.block is not None:
            blocks = form.width // form.codes.block
            box = refs["scales"].at[layer, pl.ds(lax.div(first, jnp.int32(form.codes.block)), blocks)]
            plgpu.copy_gmem_to_smem(box.at[:, pl.ds(output, outputs)], smem["scales"].at[slot, sub], barrier)
        for name, wanted in (("scales", form.scales_products), ("zeros", form.has_zeros)):
            if wanted:
                plgpu.copy_gmem_to_smem(refs[name].at[line], smem[name].at[slot, sub], barrier)


def _layer(refs: dict, form: Form) -> Array:
    return jnp.clip(refs["layer"][0], 0, form.layers - 1)


def add_step(acc: Array, smem: dict, form: Form, *, slot: Any, warpgroup: Any, interpreted: bool) -> Array:
    """`acc` and the products of one step that has arrived, for the 64 outputs of a warpgroup."""
    rows = pl.ds(warpgroup * ROWS, ROWS)
    for sub in range(smem["x"].shape[1]):
        sides = None if form.sides is None else smem[form.sides].at[slot, sub]
        if sides is not None:
            sides = sides.at[rows] if form.codes.block is None else sides.at[:, rows]
        apart = ROWS if interpreted else smem["codes"].shape[1]  # the interpreter makes an array of what a view shows
        weights = _weights(smem["codes"].at[slot, rows], sides, form, sub=sub, apart=apart, interpreted=interpreted)
        product = _product(weights, smem["x"].at[slot, sub], interpreted=interpreted)
        if form.scales_products:
            scales = plgpu.load(smem["scales"].at[slot, sub, rows], layout=ROW, optimized=False)
            product = product * lax.broadcast_in_dim(scales.astype(jnp.float32), acc.shape, [0])
        acc = acc + product
    return acc


def finished(acc: Array, refs: dict, form: Form, *, output: Any) -> Array:
    """Sums `[64, tokens]` of the outputs from `output` on with the scales that waited for them."""
    if not form.is_unfinished:
        return acc
    layer = _layer(refs, form)
    if form.scales_outputs:  # `inputs` lets the last 64 end within the array
        first = layer * form.outputs + jnp.minimum(output, whole(form.outputs, ROWS) - ROWS)
        scales = plgpu.load(refs["scales"].at[pl.ds(first, ROWS)], layout=ROW, optimized=False)
        acc = acc * lax.broadcast_in_dim(scales.astype(jnp.float32), acc.shape, [0])
    if form.has_global_scale:
        acc = acc * (refs["global_scale"][layer] * form.codes.factor)
    elif form.codes.factor != 1:
        acc = acc * form.codes.factor
    return acc


def _product(weights: Array, x_ref: Any, *, interpreted: bool) -> Array:
    """float32 `[64, tokens]`, of bfloat16 weights `[64, width]` and activations `[tokens, width]`, `permuted`."""
    if interpreted:  # by an interpreter that knows no left operand in registers
        return jnp.dot(weights.astype(jnp.float32), x_ref[...].astype(jnp.float32).T)

    def multiply(acc_ref):
        plgpu.wgmma(acc_ref, weights, x_ref.transpose((1, 0)))
        return acc_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC((ROWS, x_ref.shape[0]), jnp.float32))


def inputs(operands: Operands, form: Form) -> dict[str, Array]:
    """The kernel's arrays in global memory."""
    x, codes, scales, zeros, layer, global_scale = operands
    arrays = {"x": permuted(x, form), "codes": codes, "layer": layer.reshape(1)}
    if form.codes.block is not None:
        arrays["scales"] = scales
    elif form.scales_outputs and (beyond := -form.outputs % ROWS):
        arrays["scales"] = jnp.pad(scales.reshape(-1), (0, beyond))
    else:
        arrays["scales"] = scales.reshape(-1)
    if zeros is not None:
        arrays["zeros"] = zeros.reshape(-1)
    if global_scale is not None:
        arrays["global_scale"] = global_scale
    return arrays


def _weights(codes_ref: Any, sides_ref: Any, form: Form, *, sub: int, apart: int, interpreted: bool) -> Array:
    """The codes of a product as bfloat16 `[64, width]`, the columns in the order of `permuted`.

    Args:
      codes_ref: `[64, bytes]` in shared memory, of a step.
      sides_ref: zeros `[64]` or scales `[blocks, 64]` of the product; None: none.
      form: of the call.
      sub: the product's number in the step.
      apart: bytes from the scales of a block to those of the next.
      interpreted: whether the interpreter runs this.
    """
    rows, stride = codes_ref.shape
    codes, width = form.codes, form.width
    words = width // (4 * codes.per_word)  # of a thread, for one row
    blocks = 1 if codes.block is None else width // (4 * codes.block)  # of a thread

    def registers(on: Any, thread: Any, load_words: Callable, load_side: Callable) -> list[list[Any]]:
        """For each of the two rows of a thread, which are eight apart; the loads take bytes into their arrays."""
        row = on.add(on.times(on.right(thread, 5), 16), on.right(on.modulo(thread, 32), 2))
        quarter = on.modulo(thread, 4)

        def side(block, half):
            """Zeros are of a row; scales are of a thread's own blocks."""
            offset = on.add(row, block * apart + half * 8)
            return load_side(offset if codes.block is None else on.add(offset, on.times(quarter, blocks * apart)))

        by_block = [[codes.side] * 2] * blocks
        if sides_ref is not None:
            by_block = [codes.sides(on, [side(block, half) for half in range(2)]) for block in range(blocks)]
        made: list[list[Any]] = [[], []]
        first = on.add(on.times(row, stride), on.times(quarter, 4 * words))
        for half in range(2):
            loaded = load_words(on.add(first, half * 8 * stride + codes.bytes(sub * width)))
            for i, word in enumerate(loaded):
                made[half] += codes.pairs(on, word, by_block[i * blocks // len(loaded)][half])
        return made

    if interpreted:  # all threads and all words of a block at once
        of_block = words // blocks

        def load_words(offset):
            of_codes = lax.bitcast_convert_type(_bits(codes_ref, jnp.uint8).reshape(-1, 4), jnp.uint32)
            word = lax.broadcasted_iota(jnp.uint32, (of_block, 128), 0)
            return [of_codes[offset // 4 + block * of_block + word] for block in range(blocks)]

        def load_side(offset):
            return _bits(sides_ref, jnp.int8)[offset].astype(jnp.int32).astype(jnp.uint32)

        thread = lax.broadcasted_iota(jnp.uint32, (128,), 0)
        made = jnp.stack([jnp.stack(pairs) for pairs in registers(Integers(), thread, load_words, load_side)])
        two = jnp.stack([made & 0xFFFF, made >> 16], axis=-1).astype(jnp.uint16)
        # Half, block, pair, word, warp, row, quarter, low and high: in the order of wgmma's left operand.
        two = two.reshape(2, blocks, codes.per_word // 2, of_block, 4, 8, 4, 2).transpose(4, 0, 5, 1, 3, 2, 6, 7)
        return lax.bitcast_convert_type(two, jnp.bfloat16).reshape(rows, width)

    result = plgpu.ShapeDtypeStruct((rows, width), jnp.bfloat16, layout=WGMMA)
    arguments = (codes_ref,) if sides_ref is None else (codes_ref, sides_ref)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(arguments), return_type=result)
    def convert(ctx, codes_ref, sides_ref=None):
        del ctx
        i8, i32 = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(32)
        of_codes, *of_sides = (mgpu_utils.memref_ptr(ref) for ref in (codes_ref, sides_ref) if ref is not None)

        def load_words(offset):
            vector_type = ir.VectorType.get((words,), i32)
            several = llvm.load(vector_type, _at(of_codes, offset, i8), alignment=4 * words)
            return [vector.extract(several, dynamic_position=[], static_position=[i]) for i in range(words)]

        def load_side(offset):
            return arith.extsi(i32, llvm.load(i8, _at(of_sides[0], offset, i8)))

        thread = arith.remui(mgpu.thread_idx(), mgpu.c(128, i32))
        bf16_pair = ir.VectorType.get((2,), ir.BF16Type.get())
        made = registers(Instructions(), thread, load_words, load_side)
        by_row = [[llvm.bitcast(bf16_pair, pair) for pair in pairs] for pairs in made]
        layout = mgpu.WGMMA_LAYOUT
        return mgpu.FragmentedArray(
            _registers=np.array(by_row, object).T.reshape(layout.registers_shape((rows, width))),
            _layout=layout,
            _is_signed=None,
        )

    return convert(*arguments)


def _bits(ref: Any, dtype: Any) -> Array:
    """The bytes of an array of such elements, one after the other."""
    return lax.bitcast_convert_type(ref[...], dtype).reshape(-1)


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
