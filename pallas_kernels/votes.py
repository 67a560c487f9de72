"""A vote of the 128 threads of a warpgroup in one instruction, which Pallas does not offer."""

from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array, Bool, Int

THREADS = 128
FIRST_BARRIER = 8  # hardware has 16; Mosaic takes 0 and one per warpgroup from 1 on


def any_of(flags: Int[Array, "rows"], warpgroup: Int[Array, ""], *, layout: Any, interpreted: bool) -> Bool[Array, ""]:
    """Whether one of the flags is not 0, by the barrier of the hardware that also combines predicates.

    A reduction of Pallas goes through shuffles and, between warps, through shared memory with two barriers, all of
    which the caller waits for; this is one barrier. It needs no memory either, so warpgroups never meet.

    Args:
      flags: 0 or 1, spread over a warpgroup.
      warpgroup: its index; each has a barrier of its own.
      layout: of the flags in registers.
      interpreted: the interpreter knows no PTX; it runs the reduction.
    """
    if interpreted:
        return flags.max() != 0

    @plgpu.inline_mgpu(
        arg_types=(layout, plgpu.Layout.WG_SPLAT),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT),
    )
    def reduce(ctx, flags, warpgroup):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        own = mgpu.c(0, i32)
        for register in flags.registers.flat:
            for i in range(ir.VectorType(register.type).shape[0]):
                own = arith.ori(own, vector.extract(register, dynamic_position=[], static_position=[i]))
        barrier = arith.addi(warpgroup.registers.item(), mgpu.c(FIRST_BARRIER, i32))
        ptx = f"""{{
            .reg .pred p, q;
            setp.ne.s32 p, $2, 0;
            barrier.cta.red.or.pred q, $1, {THREADS}, p;
            selp.s32 $0, 1, 0, q;
        }}"""
        found = llvm.inline_asm(i32, [barrier, own], ptx, "=r,r,r", has_side_effects=True, convergent=True)
        return mgpu.FragmentedArray.splat(found, (), is_signed=True)

    return reduce(flags, warpgroup) != 0
