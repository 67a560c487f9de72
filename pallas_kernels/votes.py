"""Votes of the 128 threads of a warpgroup in a few instructions of the hardware, which Pallas does not offer.

A reduction of Pallas to a scalar goes through shuffles and, between warps, through shared memory with two barriers, all
of which every warp waits for. The interpreter knows no PTX; it runs that reduction instead.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array, Bool, Int

THREADS = 128
FIRST_BARRIER = 8  # hardware has 16; Mosaic takes 0 and one per warpgroup from 1 on

_SPLAT = plgpu.Layout.WG_SPLAT
_RESULT = plgpu.ShapeDtypeStruct((), jnp.int32, layout=_SPLAT)


def any_of(flags: Int[Array, "rows"], warpgroup: Int[Array, ""], *, layout: Any, interpreted: bool) -> Bool[Array, ""]:
    """Whether one of the flags is not 0, by the barrier of the hardware that also combines predicates.

    Args:
      flags: 0 or 1, spread over a warpgroup.
      warpgroup: its index; each has a barrier of its own.
      layout: of the flags in registers.
      interpreted: whether the interpreter runs this.
    """
    if interpreted:
        return flags.max() != 0

    @plgpu.inline_mgpu(arg_types=(layout, _SPLAT), return_type=_RESULT)
    def vote(ctx, flags, warpgroup):
        del ctx
        ptx = f"""{{
            .reg .pred own, found;
            setp.ne.s32 own, $2, 0;
            barrier.cta.red.or.pred found, $1, {THREADS}, own;
            selp.s32 $0, 1, 0, found;
        }}"""
        return _run(ptx, _barrier(warpgroup), _own(flags))

    return vote(flags, warpgroup) != 0


def any_of_early(
    flags: Int[Array, "rows"],
    warpgroup: Int[Array, ""],
    ballot: Int[Array, ""],
    found_ref: Any,
    *,
    layout: Any,
    interpreted: bool,
) -> Bool[Array, ""]:
    """`any_of` where a warp that has a flag of its own tells the others and goes on at once; only the others wait.

    No warp may reach the next vote before all warps of its warpgroup have left this one: the caller passes a barrier
    in between at which all of them arrive.

    Args:
      flags: 0 or 1, spread over a warpgroup.
      warpgroup: its index; each has a barrier of its own.
      ballot: a number not used before by this warpgroup, nor initially in `found_ref`.
      found_ref: int32 in shared memory `[warpgroups]`, where each warpgroup has written its element before its first
        vote; holds the last ballot in which a flag was found.
      layout: of the flags in registers.
      interpreted: whether the interpreter runs this.
    """
    if interpreted:
        return flags.max() != 0

    @plgpu.inline_mgpu(arg_types=(layout, _SPLAT, _SPLAT, plgpu.RefType()), return_type=_RESULT)
    def vote(ctx, flags, warpgroup, ballot, found_ref):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        offset = arith.muli(warpgroup.registers.item(), mgpu.c(4, i32))
        address = arith.addi(llvm.ptrtoint(i32, mgpu_utils.memref_ptr(found_ref)), offset)
        ptx = f"""{{
            .reg .pred own, any, found;
            .reg .s32 last;
            setp.ne.s32 own, $2, 0;
            vote.sync.any.pred any, own, 0xffffffff;
            mov.s32 last, $4;
            @any st.volatile.shared.s32 [$3], $4;
            @any barrier.cta.arrive $1, {THREADS};
            @!any barrier.cta.sync $1, {THREADS};
            @!any ld.volatile.shared.s32 last, [$3];
            setp.eq.s32 found, last, $4;
            selp.s32 $0, 1, 0, found;
        }}"""
        return _run(ptx, _barrier(warpgroup), _own(flags), address, ballot.registers.item())

    return vote(flags, warpgroup, ballot, found_ref) != 0


def _barrier(warpgroup: mgpu.FragmentedArray) -> ir.Value:
    return arith.addi(warpgroup.registers.item(), mgpu.c(FIRST_BARRIER, ir.IntegerType.get_signless(32)))


def _own(flags: mgpu.FragmentedArray) -> ir.Value:
    """The flags of one thread in one register: not 0 where any is."""
    own = mgpu.c(0, ir.IntegerType.get_signless(32))
    for register in flags.registers.flat:
        for i in range(ir.VectorType(register.type).shape[0]):
            own = arith.ori(own, vector.extract(register, dynamic_position=[], static_position=[i]))
    return own


def _run(ptx: str, *operands: ir.Value) -> mgpu.FragmentedArray:
    constraints = ",".join(["=r"] + ["r"] * len(operands))
    i32 = ir.IntegerType.get_signless(32)
    found = llvm.inline_asm(i32, operands, ptx, constraints, has_side_effects=True, convergent=True)
    return mgpu.FragmentedArray.splat(found, (), is_signed=True)
