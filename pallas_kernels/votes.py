"""A vote of the warps of a warpgroup that Pallas does not offer: those that know the outcome need not wait for it."""

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


def any_of(
    flags: Int[Array, "rows"],
    warpgroup: Int[Array, ""],
    ballot: Int[Array, ""],
    found_ref: Any,
    *,
    layout: Any,
    interpreted: bool,
) -> Bool[Array, ""]:
    """Whether one of the flags is not 0, asked once per step of a loop.

    A reduction of Pallas goes through shuffles and, between warps, through shared memory with two barriers, all of
    which every warp waits for. Here a warp with a flag of its own tells the others and goes on at once; only warps
    without one wait, at one barrier of the hardware, until all have voted.

    No warp may reach the next vote before all warps of its warpgroup have left this one: the caller passes a barrier
    in between at which all of them arrive.

    Args:
      flags: 0 or 1, spread over a warpgroup.
      warpgroup: its index; each has a barrier and an element of `found_ref` of its own.
      ballot: a number not used before by this warpgroup, nor initially in `found_ref`.
      found_ref: int32 in shared memory `[warpgroups]`, where each warpgroup has written its element before its first
        vote; holds the last ballot in which a flag was found.
      layout: of the flags in registers.
      interpreted: the interpreter knows no PTX; it runs the reduction.
    """
    if interpreted:
        return flags.max() != 0

    @plgpu.inline_mgpu(
        arg_types=(layout, plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT),
    )
    def vote(ctx, flags, warpgroup, ballot, found_ref):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        own = mgpu.c(0, i32)
        for register in flags.registers.flat:
            for i in range(ir.VectorType(register.type).shape[0]):
                own = arith.ori(own, vector.extract(register, dynamic_position=[], static_position=[i]))
        warpgroup = warpgroup.registers.item()
        barrier = arith.addi(warpgroup, mgpu.c(FIRST_BARRIER, i32))
        address = llvm.ptrtoint(i32, mgpu_utils.memref_ptr(found_ref))
        address = arith.addi(address, arith.muli(warpgroup, mgpu.c(4, i32)))
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
        operands = [barrier, own, address, ballot.registers.item()]
        found = llvm.inline_asm(i32, operands, ptx, "=r,r,r,r,r", has_side_effects=True, convergent=True)
        return mgpu.FragmentedArray.splat(found, (), is_signed=True)

    return vote(flags, warpgroup, ballot, found_ref) != 0
