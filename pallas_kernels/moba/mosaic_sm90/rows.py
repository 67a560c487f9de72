"""Rows of matrices in global memory, wherever they lie, from and to matrices in shared memory.

The TMA of Hopper copies boxes of consecutive rows only. Here the threads of a warpgroup copy 16 bytes each, loads past
their registers (`cp.async`): neighbouring threads those of one row, so that memory sees whole lines, and a thread the
same 16 bytes of every eighth or sixteenth row, so that it computes one address in shared memory. All threads that copy
of a row read its index.

The interpreter knows no PTX; it copies by the indexing of Pallas.
"""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array

from pallas_kernels import compat

THREADS = 128
CHUNK = 16  # bytes of one copy, and the unit of the swizzle

_OWN = plgpu.Layout.WG_STRIDED((THREADS,), vec_size=1)  # one number per thread
_PLAIN = plgpu.RefType()


def place(row: Any, chunk: Any, chunks: int) -> Any:
    """Byte of a row's `chunk`-th 16 bytes, of `chunks`, in shared memory as `compat.swizzled` lays it out.

    Tiles of 8 rows by 128 bytes, those of the same rows side by side; in row r of a tile the 16 bytes number c lie at
    number c xor r.
    """
    tile = (row >> 3) * (chunks // 8) + (chunk >> 3)
    return tile * 1024 + (row & 7) * 128 + ((chunk ^ row) & 7) * CHUNK


def start(index_ref: Any, *copies: tuple[Any, Any], interpreted: bool) -> None:
    """Starts the copies of the rows `index`, for one warpgroup; a negative index gives a row of zeros.

    Args:
      index_ref: int32 `[rows]` in global memory; rows are a multiple of 16.
      copies: what is copied, `[R, H]` in global memory, which has all these rows, and where to, `[rows, H]` in shared
        memory, `compat.swizzled`. All are of one 16-bit dtype and the same H, a multiple of 64.
      interpreted: whether the interpreter runs this.
    """
    if interpreted:
        index = index_ref[...]
        for x_ref, smem_ref in copies:
            x = x_ref[...][jnp.maximum(index, 0)]
            smem_ref[...] = jnp.where((index >= 0)[:, None], x, jnp.zeros_like(x))
        return

    chunks, swizzled = _chunks(copies[0][1])

    @plgpu.inline_mgpu(arg_types=(_PLAIN, ((_PLAIN, swizzled),) * len(copies), (_OWN,) * 3))
    def load(ctx, index_ref, copies, lanes):
        del ctx
        ptx = """{
            .reg .pred none;
            setp.lt.s32 none, $2, 0;
            cp.async.cg.shared.global [$0], [$1], 16, none;
        }"""
        for here, there, index in _shares(index_ref, copies, lanes, chunks):
            _run(ptx, here, there, index)
        _run("cp.async.commit_group;")

    load(index_ref, copies, _lanes(chunks))


def wait(pending: int = 0, *, interpreted: bool) -> None:
    """Until the copies of all but the last `pending` calls of `start` have arrived, for all threads of a warpgroup.

    The tensor core may read them then, also that of another warpgroup that is told by a barrier.
    """
    if not interpreted:
        plgpu.inline_mgpu()(lambda ctx: _run(f"cp.async.wait_group {pending};"))()
    plgpu.commit_smem()


def store(index_ref: Any, *copies: tuple[Any, Any], interpreted: bool) -> None:
    """Copies rows in the other direction, those of a negative index nowhere; a warpgroup has just written them.

    Args:
      index_ref: int32 `[rows]` in global memory; rows are a multiple of 16, and no two are written to the same place.
      copies: what is copied, `[rows, H]` as in `start` or 32-bit numbers `[rows]`, rows a divisor of 128; and where
        to, `[P, H]` or `[P]` in global memory.
      interpreted: whether the interpreter runs this.
    """
    if interpreted:
        index = index_ref[...]
        for smem_ref, out_ref in copies:
            x = smem_ref[...]

            @pl.loop(0, index.shape[0])
            def _(i, x=x, out_ref=out_ref):
                @pl.when(index[i] >= 0)
                def _():
                    out_ref[index[i]] = x[i]

        return

    plgpu.inline_mgpu()(lambda ctx: mgpu_utils.warpgroup_barrier())()
    for smem_ref, out_ref in copies:
        (_store_numbers if len(smem_ref.shape) == 1 else _store_rows)(index_ref, smem_ref, out_ref)


def _store_rows(index_ref: Any, smem_ref: Any, out_ref: Any) -> None:
    chunks, swizzled = _chunks(smem_ref)

    @plgpu.inline_mgpu(arg_types=(_PLAIN, swizzled, _PLAIN, (_OWN,) * 3))
    def store(ctx, index_ref, smem_ref, out_ref, lanes):
        del ctx
        ptx = """{
            .reg .pred some;
            .reg .b32 a, b, c, d;
            setp.ge.s32 some, $2, $3;
            ld.shared.v4.b32 {a, b, c, d}, [$0];
            @some st.global.v4.b32 [$1], {a, b, c, d};
        }"""
        for here, there, index in _shares(index_ref, ((out_ref, smem_ref),), lanes, chunks):
            # The zero is a register on purpose. Without this last use the zero with which a kernel's accumulators begin
            # becomes a register of one of them; ptxas then no longer sees that they are zero, and takes 32 or 64
            # registers more.
            _run(ptx, here, there, index, mgpu.c(0, ir.IntegerType.get_signless(32)))

    store(index_ref, smem_ref, out_ref, _lanes(chunks))


def _store_numbers(index_ref: Any, smem_ref: Any, out_ref: Any) -> None:
    """Where there are fewer numbers than threads, several threads write the same one."""
    row = lax.div(_thread(), jnp.int32(THREADS // smem_ref.shape[0]))

    @plgpu.inline_mgpu(arg_types=(_PLAIN, _PLAIN, _PLAIN, _OWN))
    def store(ctx, index_ref, smem_ref, out_ref, row):
        del ctx
        i32, row = ir.IntegerType.get_signless(32), _number(row)
        index = llvm.load(i32, _at(_global(index_ref), row, i32))
        ptx = """{
            .reg .pred some;
            setp.ge.s32 some, $2, 0;
            @some st.global.b32 [$0], $1;
        }"""
        number = llvm.load(i32, _at(mgpu_utils.memref_ptr(smem_ref), row, i32))
        _run(ptx, _at(_global(out_ref), _row_of(index), i32), number, index)

    store(index_ref, smem_ref, out_ref, row)


def _chunks(smem_ref: Any) -> tuple[int, plgpu.RefType]:
    """How many 16 bytes a row has, and how an argument of this kind is declared."""
    columns, dtype = smem_ref.shape[1], smem_ref.dtype
    return columns * jnp.dtype(dtype).itemsize // CHUNK, plgpu.RefType(compat.swizzled(dtype, columns))


def _thread() -> Array:
    return plgpu.broadcasted_iota(jnp.int32, (THREADS,), 0, layout=_OWN)


def _lanes(chunks: int) -> tuple[Array, Array, Array]:
    """The first row of each thread, its 16 bytes of every row, and the place of both in shared memory."""
    row, chunk = lax.div(_thread(), jnp.int32(chunks)), lax.rem(_thread(), jnp.int32(chunks))
    return row, chunk, place(row, chunk, chunks)


def _shares(index_ref: ir.Value, copies: Any, lanes: Any, chunks: int) -> Iterator[tuple[ir.Value, ...]]:
    """Of all 16 bytes that a thread copies: address in shared memory, address in global memory, index."""
    i8, i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (8, 32, 64))
    row, chunk, offset = (_number(x) for x in lanes)
    # The rows that are copied at once are a multiple of 8, so a thread's places in their tiles are the same.
    first = range(0, ir.MemRefType(index_ref.type).shape[0], THREADS // chunks)
    index = _at(_global(index_ref), row, i32)
    indices = [llvm.load(i32, _at(index, mgpu.c(n, i32), i32)) for n in first]
    for there_ref, here_ref in copies:
        there = _at(_global(there_ref), arith.muli(chunk, mgpu.c(CHUNK, i32)), i8)
        here = arith.addi(llvm.ptrtoint(i32, mgpu_utils.memref_ptr(here_ref)), offset)
        for n, found in zip(first, indices, strict=True):
            bytes_before = arith.muli(_row_of(found), mgpu.c(chunks * CHUNK, i64))
            yield arith.addi(here, mgpu.c(place(n, 0, chunks), i32)), _at(there, bytes_before, i8), found


def _row_of(index: ir.Value) -> ir.Value:
    """As 64 bits; an address is formed also where nothing is read or written."""
    i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
    return arith.extui(i64, arith.maxsi(index, mgpu.c(0, i32)))


def _number(x: mgpu.FragmentedArray) -> ir.Value:
    """The one number of a thread."""
    return vector.extract(x.registers.item(), dynamic_position=[], static_position=[0])


def _at(pointer: ir.Value, offset: ir.Value, element: ir.Type) -> ir.Value:
    """The address `offset` elements after `pointer`."""
    return mgpu_utils.getelementptr(pointer, [offset], element)


def _global(ref: ir.Value) -> ir.Value:
    """The address of a reference to global memory, as one of that space."""
    return llvm.addrspacecast(llvm.PointerType.get(address_space=1), mgpu_utils.memref_ptr(ref))


def _run(ptx: str, *operands: ir.Value) -> None:
    constraints = ",".join("l" if isinstance(x.type, llvm.PointerType) else "r" for x in operands)
    llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, ptx, constraints, has_side_effects=True)
