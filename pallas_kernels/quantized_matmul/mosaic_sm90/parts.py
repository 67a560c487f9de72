"""What both kernels share: the form of a call, and a tile of codes turned into an operand of the tensor core.

Letters as in `tensor.py`, and M rows of activations.

A tile of codes is 64 outputs of `width` inputs, in shared memory in the order of global memory. A thread reads
`width / 4` codes in a row for each of its two rows, in words of 32 bits; `codes.py` makes bfloat16 numbers of a word.
All `width` inputs share a scale, which the float32 sums of their product meet, or the bfloat16 numbers themselves; or
they have scales in blocks of 16, which the codes meet in registers; or there is one scale per output, which waits for
the end, as a scale of all weights does.

The layout of wgmma wants neighbouring columns in a register and the columns of a thread spread over the row. Instead
of moving weights between threads the columns of the activations are put into the order in which the threads hold the
weights (`permuted`), unless codes lie in memory such that there is nothing to do (`order.py`): a sum over inputs
does not depend on their order.
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
from pallas_kernels.quantized_matmul.mosaic_sm90.codes import (
    CODES,
    Codes,
    Instructions,
    Integers,
    scaled,
    split_scale,
)
from pallas_kernels.quantized_matmul.order import MAX_WIDTH, input_order

ROWS = 64  # outputs of one compute warpgroup
MOST_TOKENS_IN_HALVES = 32  # of a tile, whose codes come in two copies

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
    interleaved: bool = False  # codes lie such that activations stay as they are

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
    def scales_groups(self) -> bool:
        """Whether groups have scales of their own, which their sums meet or their codes."""
        return self.groups > 1 and self.codes.block is None

    @property
    def scales_outputs(self) -> bool:
        """Whether the sums of an output meet its one scale at the end."""
        return self.groups == 1 and self.codes.block is None

    @property
    def has_late_scales(self) -> bool:
        """Whether sums wait for scales of their weight (`late_scales`)."""
        return self.scales_outputs or self.has_global_scale

    @property
    def width(self) -> int:
        """Inputs in whose order a thread reads codes: of one group, if these have scales."""
        return min(self.group_size, MAX_WIDTH) if self.scales_groups else MAX_WIDTH

    def steps(self, block_k: int) -> int:
        """Of `block_k` inputs."""
        return -(-self.inputs // block_k)

    def takes(self, block_k: int) -> bool:
        """Whether every step of so many inputs is of whole groups, or of a part of one."""
        return self.groups == 1 or block_k % self.group_size == 0 or self.group_size % block_k == 0

    def lines(self, inputs: int) -> int:
        """Of scales or zeros, a line for each group or block, that so many inputs of a step need or have before them.

        A step of which there is not even one whole group needs one all the same.
        """
        return 0 if self.groups == 1 else inputs // self.group_size


class Operands(NamedTuple):
    """The arrays of one product; see `run`."""

    x: Any
    codes: Any
    scales: Any
    zeros: Any
    layer: Any
    global_scale: Any = None


def form_of(operands: Operands, format: str, dtype: Any = jnp.float32, interleaved: bool = False) -> Form:
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
        interleaved=interleaved,
    )


def permuted(x: Array, form: Form, unit: int = 1) -> Array:
    """Activations as threads hold the weights; inputs in whole widths and units, rows in atoms."""
    rows, inputs = compat.whole_atoms(form.rows), whole(form.inputs, math.lcm(form.width, unit))
    if x.shape != (rows, inputs):
        x = jnp.pad(x, ((0, rows - form.rows), (0, inputs - form.inputs)))
    if form.interleaved:
        return x
    # A gather: XLA makes it part of what makes the activations, and a transposition a kernel of its own.
    order = jnp.asarray(input_order(form.width, form.codes.bits))
    return x.reshape(rows, -1, form.width)[..., order].reshape(rows, inputs)


def buffers(form: Form, *, stages: int, block_k: int, outputs: int, tokens: int, cluster: int) -> dict[str, Any]:
    """The ring of steps: codes, activations, and scales and zeros as far as the products need them.

    A copy of each, but two of codes: half of the warpgroups begin while the codes of the others are on their way, so
    that not all need the same units of the multiprocessor at the same time. More than two copies gain nothing, since
    each barrier takes time to set up; and many tokens leave no register for another barrier.
    """
    codes, lines = code_buffers(form, stages=stages, block_k=block_k, outputs=outputs)
    others_ready = {"others_ready": plgpu.Barrier(num_arrivals=1, num_barriers=stages)}
    return {
        "codes": codes,
        "x": plgpu.SMEM((stages, tokens, block_k), jnp.bfloat16, transforms=compat.swizzled(jnp.bfloat16, form.width)),
        **lines,
        "ready": plgpu.Barrier(num_arrivals=2 + len(lines), num_barriers=stages),
        **(others_ready if tokens <= MOST_TOKENS_IN_HALVES else {}),
        "free": free(outputs // ROWS, stages, cluster),
    }


def code_buffers(form: Form, *, stages: int, block_k: int, outputs: int) -> tuple[Any, dict[str, Any]]:
    """A ring of codes, and by name those of the scales and zeros that come with them."""
    shape = (stages, max(1, form.lines(block_k)), outputs)
    lines: dict[str, Any] = {}
    if form.scales_groups or form.codes.block is not None:
        lines["scales"] = plgpu.SMEM(shape, form.scale_dtype)
    if form.has_zeros:
        lines["zeros"] = plgpu.SMEM(shape, jnp.int8)
    return plgpu.SMEM((stages, outputs, form.codes.bytes(block_k)), form.codes.dtype), lines


def free(warpgroups: int, stages: int, cluster: int) -> Any:
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
    """Begins to write `acc [64, tokens]`, transposed, to `[tokens, 64]` in global memory through its buffer."""
    acc = acc.astype(result_ref.dtype)
    result_ref.transpose((1, 0))[...] = plgpu.layout_cast(acc, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(result_ref, out_ref)


def await_stores(left: int = 0) -> None:
    """Until the buffers of all stores but the last `left` are free. What they write is there when the kernel ends."""
    plgpu.wait_smem_to_gmem(left, wait_read_only=True)


def load_step(
    refs: dict, smem: dict, form: Form, *, layer: Any, step: Any, slot: Any, output: Any, token: Any, cluster: int
) -> None:
    """Starts the copies of one step, for the outputs from `output` on and the tokens from `token` on.

    The CTAs of a cluster load the activations together.
    """
    _, outputs, _ = smem["codes"].shape
    first, barrier = step * smem["x"].shape[2], smem["ready"].at[slot]
    load_x(refs, smem["x"].at[slot], token=token, first=first, barrier=barrier, cluster=cluster)
    load_lines(refs, smem, form, layer=layer, first=first, slot=slot, output=output, barrier=barrier)
    copies = ["ready", "others_ready"] if "others_ready" in smem else ["ready"]
    size = outputs // len(copies)
    for i, name in enumerate(copies):
        where: dict[str, Any] = {"layer": layer, "step": step, "output": output + i * size}
        load_codes(refs, smem["codes"].at[slot, pl.ds(i * size, size)], **where, barrier=smem[name].at[slot])


def await_step(smem: dict, *, slot: Any, warpgroup: Any) -> None:
    """Until what a warpgroup needs of the step in a slot has arrived."""
    plgpu.barrier_wait(smem["ready"].at[slot])
    if "others_ready" in smem:
        _, outputs, _ = smem["codes"].shape
        is_other = warpgroup >= outputs // ROWS // 2
        pl.when(is_other)(lambda: plgpu.barrier_wait(smem["others_ready"].at[slot]))


def load_codes(refs: dict, codes_ref: Any, *, layer: Any, step: Any, output: Any, barrier: Any) -> None:
    outputs, width = codes_ref.shape
    codes = refs["codes"].at[layer, pl.ds(output, outputs), pl.ds(step * width, width)]
    plgpu.copy_gmem_to_smem(codes, codes_ref, barrier)


def load_x(refs: dict, x_ref: Any, *, token: Any, first: Any, barrier: Any, cluster: int) -> None:
    together: dict[str, Any] = {"collective_axes": "cluster"} if cluster > 1 else {}
    tokens, inputs = x_ref.shape
    plgpu.copy_gmem_to_smem(refs["x"].at[pl.ds(token, tokens), pl.ds(first, inputs)], x_ref, barrier, **together)


def load_lines(
    refs: dict, smem: dict, form: Form, *, layer: Any, first: Any, slot: Any, output: Any, barrier: Any
) -> None:
    """Scales and zeros of the inputs of a step, from `first` on; 0 beyond the last input and the last output."""
    line = lax.div(first, jnp.int32(form.group_size))
    for name in ("scales", "zeros"):
        if name in smem:
            _, count, outputs = smem[name].shape
            box = refs[name].at[layer, pl.ds(line, count), pl.ds(output, outputs)]
            plgpu.copy_gmem_to_smem(box, smem[name].at[slot], barrier)


def layer_of(refs: dict, form: Form) -> Array:
    if form.layers == 1:  # nothing can begin before the number has come from the memory
        return jnp.int32(0)
    return jnp.clip(refs["layer"][0], 0, form.layers - 1)


def add_step(acc: Array, smem: dict, form: Form, *, slot: Any, warpgroup: Any, interpreted: bool) -> Array:
    """`acc` and the products of one step that has arrived, for the 64 outputs of a warpgroup; sums meet scales."""
    for first in range(0, smem["x"].shape[2], form.width):
        place = {"slot": slot, "warpgroup": warpgroup, "first": first, "count": form.width}
        operand = weights(smem, form, **place, is_scaled=False, interpreted=interpreted)
        product = _product(operand, smem["x"].at[slot, :, pl.ds(first, form.width)], interpreted=interpreted)
        if form.scales_groups:
            rows = pl.ds(warpgroup * ROWS, ROWS)
            scales = plgpu.load(smem["scales"].at[slot, form.lines(first), rows], layout=ROW, optimized=False)
            product = product * lax.broadcast_in_dim(scales.astype(jnp.float32), acc.shape, [0])
        acc = acc + product
    return acc


def late_scales(refs: dict, form: Form, *, layer: Any, output: Any) -> tuple[Array | None, Array | None]:
    """What waits for the sums of the 64 outputs from `output` on: their own scales, and the scale of all weights."""
    of_outputs, of_all = None, None
    if form.scales_outputs:  # `inputs` lets the last 64 end within the array
        first = layer * form.outputs + jnp.minimum(output, whole(form.outputs, ROWS) - ROWS)
        of_outputs = plgpu.load(refs["scales"].at[pl.ds(first, ROWS)], layout=ROW, optimized=False)
    if form.has_global_scale:
        of_all = refs["global_scale"][layer]
    return of_outputs, of_all


def finished(acc: Array, form: Form, scales: tuple[Array | None, Array | None] = (None, None)) -> Array:
    """Sums `[64, tokens]` with the scales that waited for them (`late_scales`), and the factor of the codes."""
    of_outputs, of_all = scales
    if of_outputs is not None:
        acc = acc * lax.broadcast_in_dim(of_outputs.astype(jnp.float32), acc.shape, [0])
    if of_all is not None:
        acc = acc * (of_all * form.codes.factor)
    elif form.codes.factor != 1:
        acc = acc * form.codes.factor
    return acc


def interpreted_product(operand: Array, x_ref: Any) -> Array:
    """What stands for a product in the interpreter, which knows no left operand in registers."""
    return jnp.dot(operand.astype(jnp.float32), x_ref[...].astype(jnp.float32).T)


def _product(operand: Array, x_ref: Any, *, interpreted: bool) -> Array:
    """float32 `[64, tokens]`, of bfloat16 weights `[64, width]` and activations `[tokens, width]`, `permuted`."""
    if interpreted:
        return interpreted_product(operand, x_ref)

    def multiply(acc_ref):
        plgpu.wgmma(acc_ref, operand, x_ref.transpose((1, 0)))
        return acc_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC((ROWS, x_ref.shape[0]), jnp.float32))


def inputs(operands: Operands, form: Form, unit: int = 1) -> dict[str, Array]:
    """The kernel's arrays in global memory, activations in whole units of inputs."""
    x, codes, scales, zeros, layer, global_scale = operands
    arrays = {"x": permuted(x, form, unit), "codes": codes, "layer": layer.reshape(1)}
    arrays["scales"] = scales
    if form.scales_outputs:  # read in parts that begin anywhere
        arrays["scales"] = jnp.pad(scales.reshape(-1), (0, -form.outputs % ROWS))
    if zeros is not None:
        arrays["zeros"] = zeros
    if global_scale is not None:
        arrays["global_scale"] = global_scale
    return arrays


class Chunk(NamedTuple):
    """Words that a thread reads in a row for each of its rows: of `form.width` inputs, or of a part of them."""

    sub: int  # the number of these inputs in the step
    first_word: int
    words: int
    blocks: range  # of the thread; without scales in blocks the one block that there is


def chunks(form: Form, first: int, count: int) -> list[Chunk]:
    """Of `count` inputs of a step from `first` on, in the order of `permuted`."""
    codes, width = form.codes, form.width
    made = []
    for begin in range(first, first + count, min(count, width)):
        whole_blocks = 1 if codes.block is None else width // (4 * codes.block)
        of_word = 4 * codes.per_word  # inputs
        first_word, words = begin % width // of_word, min(count, width) // of_word
        blocks = range(
            begin % width * whole_blocks // width, -(-(begin % width + of_word * words) * whole_blocks // width)
        )
        made.append(Chunk(begin // width, first_word, words, blocks))
    return made


def weights(
    smem: dict, form: Form, *, slot: Any, warpgroup: Any, first: int, count: int, is_scaled: bool, interpreted: bool
) -> Array:
    """Codes of a step as bfloat16 `[64, count]`, the columns in the order of `permuted`.

    Args:
      smem: the ring that holds the step.
      form: of the call.
      slot: of the ring.
      warpgroup: whose 64 outputs.
      first: input of the step that is the first column.
      count: of inputs; a part of `form.width` in whole words of all threads, or a multiple of it.
      is_scaled: whether they meet the scales of their groups, if they have such, and are rounded.
      interpreted: whether the interpreter runs this.
    """
    rows, (_, outputs, stride) = pl.ds(warpgroup * ROWS, ROWS), smem["codes"].shape
    codes, shape, parts = form.codes, (ROWS, count), chunks(form, first, count)
    refs: dict[Any, Any] = {"codes": smem["codes"].at[slot, rows]}
    for chunk in parts:
        if form.sides is not None:
            before = form.lines(chunk.sub * form.width)
            lines = before if codes.block is None else pl.ds(before, form.width // codes.block)
            refs["sides", chunk.sub] = smem[form.sides].at[slot, lines, rows]
        if is_scaled and form.scales_groups:
            refs["scales", chunk.sub] = smem["scales"].at[slot, form.lines(chunk.sub * form.width), rows]
    # Bytes from the scales of a block to those of the next; the interpreter makes an array of what a view shows.
    apart = ROWS if interpreted else outputs

    def registers(on: Any, thread: Any, load: Callable, load_words: Callable) -> list[list[Any]]:
        """For each of the two rows of a thread, which are eight apart."""
        row = on.add(on.times(on.right(thread, 5), 16), on.right(on.modulo(thread, 32), 2))
        quarter = on.modulo(thread, 4)

        def side(chunk, block, half):
            """Zeros are of a row; scales in blocks are of a thread's own blocks."""
            offset = on.add(row, block * apart + half * 8)
            if codes.block is not None:
                offset = on.add(offset, on.times(quarter, form.width // (4 * codes.block) * apart))
            return load(("sides", chunk.sub), offset)

        made: list[list[Any]] = [[], []]
        of_quarter = codes.bytes(form.width) // 4
        begin = on.add(on.times(row, stride), on.times(quarter, of_quarter))
        for chunk in parts:
            by_block = [[codes.side] * 2] * len(chunk.blocks)
            if form.sides is not None:
                by_block = [codes.sides(on, [side(chunk, block, half) for half in range(2)]) for block in chunk.blocks]
            for half in range(2):
                first_byte = chunk.sub * codes.bytes(form.width) + 4 * chunk.first_word
                loaded = load_words(on.add(begin, half * 8 * stride + first_byte), chunk)
                pairs = []
                for i, word in enumerate(loaded):
                    pairs += codes.pairs(on, word, by_block[i * len(chunk.blocks) // len(loaded)][half])
                if ("scales", chunk.sub) in refs:
                    scale = load(("scales", chunk.sub), on.add(row, half * 8))
                    scale = split_scale(on, scale, form.scale_dtype)
                    pairs = [scaled(on, pair, *scale) for pair in pairs]
                made[half] += pairs
        return made

    if interpreted:  # all threads and all words of a block at once
        return _interpreted_weights(refs, form, parts, registers)

    result = plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs), return_type=result)
    def convert(ctx, *given):
        del ctx
        i8, i32 = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(32)
        pointers = {name: mgpu_utils.memref_ptr(ref) for name, ref in zip(refs, given, strict=True)}

        def load_words(offset, chunk):
            vector_type = ir.VectorType.get((chunk.words,), i32)
            several = llvm.load(vector_type, _at(pointers["codes"], offset, i8), alignment=4 * chunk.words)
            return [vector.extract(several, dynamic_position=[], static_position=[i]) for i in range(chunk.words)]

        def load(name, offset):
            """A byte, or the bits of a scale in float32."""
            if name[0] == "sides":
                return arith.extsi(i32, llvm.load(i8, _at(pointers[name], offset, i8)))
            f32 = ir.F32Type.get()
            element = mgpu_utils.dtype_to_ir_type(form.scale_dtype)
            scale = llvm.load(element, _at(pointers[name], offset, element))
            return arith.bitcast(i32, scale if element == f32 else arith.extf(f32, scale))

        thread = arith.remui(mgpu.thread_idx(), mgpu.c(128, i32))
        bf16_pair = ir.VectorType.get((2,), ir.BF16Type.get())
        made = registers(Instructions(), thread, load, load_words)
        by_row = [[llvm.bitcast(bf16_pair, pair) for pair in pairs] for pairs in made]
        layout = mgpu.WGMMA_LAYOUT
        return mgpu.FragmentedArray(
            _registers=np.array(by_row, object).T.reshape(layout.registers_shape(shape)),
            _layout=layout,
            _is_signed=None,
        )

    return convert(*refs.values())


def _interpreted_weights(refs: dict, form: Form, parts: list[Chunk], registers: Callable) -> Array:
    """`weights` of all threads, and of all words of a block, at once."""
    codes = form.codes

    def load_words(offset, chunk):
        of_codes = lax.bitcast_convert_type(_bits(refs["codes"], jnp.uint8).reshape(-1, 4), jnp.uint32)
        of_block = chunk.words // len(chunk.blocks)
        word = lax.broadcasted_iota(jnp.uint32, (of_block, 128), 0)
        return [of_codes[offset // 4 + block * of_block + word] for block in range(len(chunk.blocks))]

    def load(name, offset):
        if name[0] == "sides":
            return _bits(refs[name], jnp.int8)[offset].astype(jnp.int32).astype(jnp.uint32)
        return lax.bitcast_convert_type(refs[name][...].reshape(-1)[offset].astype(jnp.float32), jnp.uint32)

    thread = lax.broadcasted_iota(jnp.uint32, (128,), 0)
    made = jnp.stack([jnp.stack(pairs) for pairs in registers(Integers(), thread, load, load_words)])
    two = jnp.stack([made & 0xFFFF, made >> 16], axis=-1).astype(jnp.uint16)
    runs = sum(len(chunk.blocks) for chunk in parts)  # of words made together
    # Half, run, pair, word, warp, row, quarter, low and high: in the order of wgmma's left operand.
    two = two.reshape(2, runs, codes.per_word // 2, -1, 4, 8, 4, 2).transpose(4, 0, 5, 1, 3, 2, 6, 7)
    return lax.bitcast_convert_type(two, jnp.bfloat16).reshape(ROWS, -1)


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
