"""The kernel of many tokens: a CTA for each tile of outputs and tokens, over all inputs.

As in `decode.py` outputs are the rows of the tensor core's tiles and tokens the columns. Two warpgroups of 64 outputs
each take turns on the tensor core by themselves: while one waits for its products the other converts codes. The tile of
activations is larger than that of codes; the CTAs of a cluster, which have different outputs and the same tokens, each
load a part of it for all.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import compat
from pallas_kernels.quantized_matmul.mosaic_sm90 import parts
from pallas_kernels.quantized_matmul.mosaic_sm90.parts import ROWS, WGMMA, Form, Operands

WARPGROUPS = 2  # that compute
BLOCK_O = WARPGROUPS * ROWS
BLOCK_K = 128  # inputs of a step


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillConfig:
    """Tiles. They change speed only.

    Attributes:
      block_m: tokens of a tile.
      stages: slots of the ring.
      cluster: CTAs that share the activations that they load, 1, 2 or 4.
    """

    block_m: int = 128
    stages: int = 4
    cluster: int = 2

    def __post_init__(self):
        if self.block_m not in (64, 128):
            raise ValueError(f"block_m must be 64 or 128; got {self.block_m}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2; got {self.stages}")
        if self.cluster not in (1, 2, 4):
            raise ValueError(f"cluster must be 1, 2 or 4; got {self.cluster}")

    def buffers(self, form: Form) -> dict[str, Any]:
        """What the kernel allocates per CTA, by name."""
        ring = parts.buffers(
            form,
            stages=self.stages,
            block_k=BLOCK_K,
            outputs=BLOCK_O,
            tokens=self.block_m,
            cluster=self.cluster,
        )
        return ring | {"result": parts.result_buffer(WARPGROUPS, self.block_m, form.dtype)}

    def smem_bytes(self, form: Form) -> int:
        return compat.shared_memory_bytes(list(self.buffers(form).values()))


@functools.partial(jax.jit, static_argnames=("form", "config", "interpret"))
def run(operands: Operands, *, form: Form, config: PrefillConfig, interpret) -> Float[Array, "M O"]:
    stages, block_m, cluster = config.stages, config.block_m, config.cluster
    steps = form.steps(BLOCK_K)
    interpreted = interpret is not None
    i32 = jnp.int32

    def kernel(refs, out_ref, smem):
        warpgroup = lax.axis_index("warpgroup")
        output = lax.axis_index("outputs") * cluster
        if cluster > 1:
            output = output + lax.axis_index("cluster")
        output, token = output * BLOCK_O, lax.axis_index("tokens") * block_m

        @pl.when(warpgroup < WARPGROUPS)
        def compute():
            plgpu.set_max_registers(232, action="increase")

            def over_steps(step, acc):
                slot = lax.rem(step, i32(stages))
                plgpu.barrier_wait(smem["ready"].at[slot])
                acc = parts.add_step(acc, smem, form, slot=slot, warpgroup=warpgroup, interpreted=interpreted)
                parts.release(smem["free"].at[slot], cluster)
                return acc

            acc = plgpu.layout_cast(jnp.zeros((ROWS, block_m), jnp.float32), WGMMA)
            acc = lax.fori_loop(0, steps, over_steps, acc)
            acc = parts.finished(acc, refs, form, output=output + warpgroup * ROWS)
            where = (pl.ds(token, block_m), pl.ds(output + warpgroup * ROWS, ROWS))
            parts.store(acc, smem["result"].at[warpgroup], out_ref.at[where])

        @pl.when(warpgroup == WARPGROUPS)
        def load():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, steps)
            def over_steps(step):
                slot = lax.rem(step, i32(stages))

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(smem["free"].at[slot])
                    plgpu.commit_smem()  # ordinary reads of the slot before the next TMA

                parts.load_step(refs, smem, form, step=step, slot=slot, output=output, token=token, cluster=cluster)

            # Every completion of a barrier must be observed before the kernel ends.
            @pl.loop(max(steps - stages, 0), steps)
            def _(step):
                plgpu.barrier_wait(smem["free"].at[lax.rem(step, i32(stages))])

    buffers = config.buffers(form)

    def quantized_prefill(refs, result, *scratch):
        kernel(refs, result, dict(zip(buffers, scratch, strict=True)))

    out = compat.kernel(
        quantized_prefill,
        out_type=jax.ShapeDtypeStruct(parts.result_shape(form), form.dtype),
        # The last axis varies fastest: CTAs that run at the same time read the same activations.
        grid=(-(-form.rows // block_m), -(-form.outputs // (BLOCK_O * cluster))),
        grid_names=("tokens", "outputs"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=list(buffers.values()),
        interpret=interpret,
        **parts.cluster_options(cluster),
    )(parts.inputs(operands, form))
    return out[: form.rows, : form.outputs]
