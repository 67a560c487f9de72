"""Rows from anywhere in a matrix in global memory as an operand of the tensor core in shared memory.

The TMA of Hopper copies boxes of consecutive rows only. Here the threads of a warpgroup copy 16 bytes each, past their
registers (`cp.async`): neighbouring threads those of one row, so that rows are read in whole lines, and a thread the
same 16 bytes of every eighth or sixteenth row, so that it computes one address in shared memory. An index of a row is
read by all threads that copy of it.

The interpreter knows no PTX; it copies by an index of Pallas.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels import compat

THREADS = 128
CHUNK = 16  # bytes of one copy, and the unit of the swizzle


def place(row: Any, chunk: Any, chunks: int) -> Any:
    """Byte of a row's `chunk`-th 16 bytes, of `chunks`, in shared memory as `compat.swizzled` lays it out.

    Tiles of 8 rows by 128 bytes, those of the same rows side by side; in row r of a tile the 16 bytes number c lie at
    number c xor r.
    """
    tile = (row >> 3) * (chunks // 8) + (chunk >> 3)
    return tile * 1024 + (row & 7) * 128 + ((chunk ^ row) & 7) * CHUNK


def start(index_ref: Any, *copies: tuple[Any, Any], interpreted: bool) -> None:
    """Starts the copies of rows, for one warpgroup; where an index is negative the row becomes zeros.

    Args:
      index_ref: int32 `[rows]` in global memory; rows are a multiple of 16.
      copies: what is copied, `[R, H]` in global memory with R above every index, and where to, `[rows, H]` in shared
        memory, `compat.swizzled`. All are of one 16-bit dtype and the same H, a multiple of 64.
      interpreted: whether the interpreter runs this.
    """
    (rows, columns), dtype = copies[0][1].shape, copies[0][1].dtype
    if interpreted:
        index = index_ref[...]
        for x_ref, smem_ref in copies:
            x = x_ref[...][jnp.maximum(index, 0)]
            smem_ref[...] = jnp.where((index >= 0)[:, None], x, jnp.zeros_like(x))
        return

    chunks = columns * jnp.dtype(dtype).itemsize // CHUNK
    at_once = THREADS // chunks  # rows; a multiple of 8, so that a thread's place in a tile stays the same
    own = plgpu.Layout.WG_STRIDED((THREADS,), vec_size=1)
    thread = plgpu.broadcasted_iota(jnp.int32, (THREADS,), 0, layout=own)
    row, chunk = lax.div(thread, jnp.int32(chunks)), lax.rem(thread, jnp.int32(chunks))
    sources, targets = zip(*copies, strict=True)
    plain, swizzled = plgpu.RefType(), plgpu.RefType(compat.swizzled(dtype, columns))
    arguments = (plain, (plain,) * len(copies), (swizzled,) * len(copies), own, own, own)

    @plgpu.inline_mgpu(arg_types=arguments)
    def copy(ctx, index_ref, sources, targets, row, chunk, offset):
        del ctx
        i8, i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (8, 32, 64))
        row, chunk, offset = (_number(x) for x in (row, chunk, offset))
        first = range(0, rows, at_once)
        index = _at(_in_global_memory(index_ref), row, i32)
        indices = [llvm.load(i32, _at(index, mgpu.c(n, i32), i32)) for n in first]
        ptx = """{
            .reg .pred none;
            setp.lt.s32 none, $2, 0;
            cp.async.cg.shared.global [$0], [$1], 16, none;
        }"""
        for x_ref, smem_ref in zip(sources, targets, strict=True):
            x = _at(_in_global_memory(x_ref), arith.muli(chunk, mgpu.c(CHUNK, i32)), i8)
            smem = arith.addi(llvm.ptrtoint(i32, mgpu_utils.memref_ptr(smem_ref)), offset)
            for n, found in zip(first, indices, strict=True):
                # An address is formed also where nothing is read from it.
                of_row = arith.extsi(i64, arith.maxsi(found, mgpu.c(0, i32)))
                source = _at(x, arith.muli(of_row, mgpu.c(chunks * CHUNK, i64)), i8)
                _run(ptx, arith.addi(smem, mgpu.c(place(n, 0, chunks), i32)), source, found)
        _run("cp.async.commit_group;")

    copy(index_ref, sources, targets, row, chunk, place(row, chunk, chunks))


def wait(pending: int = 0, *, interpreted: bool) -> None:
    """Until the copies of all but the last `pending` calls of `start` have arrived, for all threads of a warpgroup.

    The tensor core may read them then, also that of another warpgroup that is told by a barrier.
    """
    if not interpreted:
        plgpu.inline_mgpu()(lambda ctx: _run(f"cp.async.wait_group {pending};"))()
    plgpu.commit_smem()


def _number(x: mgpu.FragmentedArray) -> ir.Value:
    """The one number of a thread."""
    return vector.extract(x.registers.item(), dynamic_position=[], static_position=[0])


def _at(pointer: ir.Value, offset: ir.Value, element: ir.Type) -> ir.Value:
    """The address `offset` elements after `pointer`."""
    return mgpu_utils.getelementptr(pointer, [offset], element)


def _in_global_memory(ref: ir.Value) -> ir.Value:
    return llvm.addrspacecast(llvm.PointerType.get(address_space=1), mgpu_utils.memref_ptr(ref))


def _run(ptx: str, *operands: ir.Value) -> None:
    constraints = ",".join("l" if isinstance(x.type, llvm.PointerType) else "r" for x in operands)
    llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, ptx, constraints, has_side_effects=True)
