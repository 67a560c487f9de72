"""The kernel of many tokens: tiles of outputs and tokens over all inputs, dealt to CTAs that stay.

As in `decode.py` outputs are the rows of the tensor core's tiles and tokens the columns; each of two warpgroups has 64
outputs and up to 256 tokens, so that what it makes of a code serves all of these. The third loads.

The scale of a group goes into the bfloat16 operand, `(code - zero) * scale` rounded as XLA's dequantized weight is, and
the sums stay in the tensor core from the first input to the last. Operands are made of 64 inputs at a time, while the
products of the 64 before are still under way.

There are two rings, since codes are free as soon as they are in registers, and activations when their product is done:
one of codes, scales and zeros, 128 inputs to a slot, and one of activations, 64 inputs to a slot. They go on from tile
to tile: while results are stored, the loading warpgroup fetches what the next tile begins with.

The tile of activations is larger than that of codes; the CTAs of a cluster, which have different outputs and the same
tokens, each load a part of it for all.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
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
BLOCK_K = 128  # inputs of a slot of codes
HALVES = 2  # slots of activations to one of codes
HALF = BLOCK_K // HALVES
PIECE = 64  # tokens of a store
RESULT_BYTES = 32 * 1024  # at most, of the buffers of a warpgroup's stores
TILES_TOGETHER = 8  # of tokens: tiles that follow each other share outputs, too
TILE_COST = 32  # tokens that take as long as what a tile costs beside its products; not measured

# Products of 64 inputs that are under way while the next operand is made, in registers of its own. With 0 every product
# is waited for: what to set if a GPU gives wrong results with 1.
IN_FLIGHT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillConfig:
    """Tiles. They change speed only.

    Attributes:
      block_m: tokens of a tile, 64, 128, 192 or 256.
      stages: slots of the ring of activations, of 64 inputs each.
      code_stages: slots of the ring of codes, of 128 inputs each.
      cluster: CTAs that share the activations that they load, 1, 2 or 4.
      num_sms: most CTAs.
    """

    block_m: int = 256
    stages: int = 4
    code_stages: int = 3
    cluster: int = 2
    num_sms: int = 132

    def __post_init__(self):
        if self.block_m not in (64, 128, 192, 256):
            raise ValueError(f"block_m must be 64, 128, 192 or 256; got {self.block_m}")
        if self.stages < 2:  # a slot is free when the product after its own has begun
            raise ValueError(f"stages must be at least 2; got {self.stages}")
        if self.code_stages < 1:
            raise ValueError(f"code_stages must be at least 1; got {self.code_stages}")
        if self.cluster not in (1, 2, 4):
            raise ValueError(f"cluster must be 1, 2 or 4; got {self.cluster}")
        if self.num_sms < self.cluster:
            raise ValueError(f"num_sms must be at least the {self.cluster} CTAs of a cluster; got {self.num_sms}")

    def buffers(self, form: Form) -> dict[str, Any]:
        """What the kernel allocates per CTA, by name."""
        codes, lines = parts.code_buffers(form, stages=self.code_stages, block_k=BLOCK_K, outputs=BLOCK_O)
        pieces = min(self.block_m // PIECE, RESULT_BYTES // (PIECE * ROWS * form.dtype.itemsize))
        return {
            "codes": codes,
            **lines,
            "codes_ready": plgpu.Barrier(num_arrivals=1 + len(lines), num_barriers=self.code_stages),
            "codes_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=self.code_stages),
            "x": plgpu.SMEM(
                (self.stages, self.block_m, HALF), jnp.bfloat16, transforms=compat.swizzled(jnp.bfloat16, HALF)
            ),
            "x_ready": plgpu.Barrier(num_arrivals=1, num_barriers=self.stages),
            "x_free": parts.free(WARPGROUPS, self.stages, self.cluster),
            "result": parts.result_buffer(WARPGROUPS * pieces, PIECE, form.dtype),
        }

    def smem_bytes(self, form: Form) -> int:
        return compat.shared_memory_bytes(list(self.buffers(form).values()))


def tiles_of(form: Form, config: PrefillConfig) -> tuple[int, int]:
    """Of tokens and, for a whole cluster, of outputs."""
    return -(-form.rows // config.block_m), -(-form.outputs // (BLOCK_O * config.cluster))


def heuristic_config(form: Form) -> PrefillConfig:
    """The tiles that should take least time: a cluster's turns by their tokens, and what a tile costs beside them."""

    def time(config):
        return (config.block_m + TILE_COST) * turns_of(form, config)

    code_stages = 3 if form.codes.bits == 4 else 2
    configs = [PrefillConfig(block_m=block_m, code_stages=code_stages) for block_m in (256, 192, 128)]
    return parts.fitted(min(configs, key=time), form)


def turns_of(form: Form, config: PrefillConfig) -> int:
    """Most tiles of a cluster."""
    return -(-math.prod(tiles_of(form, config)) // (config.num_sms // config.cluster))


@functools.partial(jax.jit, static_argnames=("form", "config", "interpret"))
def run(operands: Operands, *, form: Form, config: PrefillConfig, interpret) -> Float[Array, "M O"]:
    stages, code_stages, block_m, cluster = config.stages, config.code_stages, config.block_m, config.cluster
    steps, (token_tiles, output_tiles) = form.steps(BLOCK_K), tiles_of(form, config)
    tiles = token_tiles * output_tiles
    clusters = min(config.num_sms // cluster, tiles)
    interpreted = interpret is not None
    buffers = config.buffers(form)
    pieces = buffers["result"].shape[0] // WARPGROUPS
    i32 = jnp.int32

    def kernel(refs, out_ref, smem):
        warpgroup, nth = lax.axis_index("warpgroup"), lax.axis_index("nth")
        rank = lax.axis_index("cluster") if cluster > 1 else 0
        count = lax.div(tiles - 1 - nth, i32(clusters)) + 1  # tiles of this cluster

        def corner(i):
            """First output and first token of this CTA in its tile i."""
            shape = (token_tiles, output_tiles)
            token, output = plgpu.planar_snake(nth + i * clusters, shape, 0, TILES_TOGETHER)
            return (output * cluster + rank) * BLOCK_O, token * block_m

        @pl.when(warpgroup < WARPGROUPS)
        def compute():
            plgpu.set_max_registers(240, action="increase")
            layer = parts.layer_of(refs, form)

            def over_steps(step, before, multiply):
                """Step `step` of a tile, of all steps the one after `before` others."""
                slot = lax.rem(before + step, i32(code_stages))
                plgpu.barrier_wait(smem["codes_ready"].at[slot])
                for half in range(HALVES):
                    place: dict[str, Any] = {"slot": slot, "warpgroup": warpgroup, "first": half * HALF, "count": HALF}
                    operand = parts.weights(smem, form, **place, is_scaled=True, interpreted=interpreted)
                    x_step = (before + step) * HALVES + half
                    x_slot = lax.rem(x_step, i32(stages))
                    plgpu.barrier_wait(smem["x_ready"].at[x_slot])
                    multiply(operand, smem["x"].at[x_slot])
                    # Of the tile before nothing is under way.
                    last = smem["x_free"].at[lax.rem(x_step + stages - 1, i32(stages))]
                    plgpu.barrier_arrive(last, **({} if half else {"predicate": step > 0}))
                plgpu.barrier_arrive(smem["codes_free"].at[slot])

            @pl.loop(0, count)
            def over_tiles(i):
                before = i * steps
                output, token = corner(i)
                output = output + warpgroup * ROWS
                scales = parts.late_scales(refs, form, layer=layer, output=output)
                acc = _summed(
                    steps,
                    lambda step, multiply: over_steps(step, before, multiply),
                    tokens=block_m,
                    interpreted=interpreted,
                )
                plgpu.barrier_arrive(smem["x_free"].at[lax.rem((before + steps) * HALVES - 1, i32(stages))])
                acc = parts.finished(acc, form, scales)
                for piece in range(block_m // PIECE):
                    parts.await_stores(pieces - 1)
                    result = smem["result"].at[warpgroup * pieces + piece % pieces]
                    first = piece * PIECE
                    where = (pl.ds(token + first, PIECE), pl.ds(output, ROWS))
                    parts.store(acc[:, first : first + PIECE], result, out_ref.at[where])

            parts.await_stores()

        @pl.when(warpgroup == WARPGROUPS)
        def load():
            plgpu.set_max_registers(24, action="decrease")
            layer = parts.layer_of(refs, form)

            @pl.loop(0, count)
            def over_tiles(i):
                output, token = corner(i)

                @pl.loop(0, steps)
                def over_steps(step):
                    nth_step = i * steps + step
                    slot = lax.rem(nth_step, i32(code_stages))
                    barrier = smem["codes_ready"].at[slot]

                    @pl.when(nth_step >= code_stages)
                    def _():
                        plgpu.barrier_wait(smem["codes_free"].at[slot])
                        plgpu.commit_smem()  # ordinary reads of the slot before the next TMA

                    where = {"layer": layer, "output": output, "barrier": barrier}
                    parts.load_codes(refs, smem["codes"].at[slot], step=step, **where)
                    parts.load_lines(refs, smem, form, first=step * BLOCK_K, slot=slot, **where)
                    for half in range(HALVES):
                        x_step = nth_step * HALVES + half
                        x_slot = lax.rem(x_step, i32(stages))

                        @pl.when(x_step >= stages)
                        def _(x_slot=x_slot):
                            plgpu.barrier_wait(smem["x_free"].at[x_slot])
                            if interpreted:  # which reads what the tensor core does, but in the ordinary way
                                plgpu.commit_smem()

                        of_x = {"token": token, "first": step * BLOCK_K + half * HALF, "cluster": cluster}
                        parts.load_x(refs, smem["x"].at[x_slot], **of_x, barrier=smem["x_ready"].at[x_slot])

            # Every completion of a barrier must be observed before the kernel ends.
            for name, total, slots in (
                ("codes_free", count * steps, code_stages),
                ("x_free", count * steps * 2, stages),
            ):

                @pl.loop(jnp.maximum(total - slots, 0), total)
                def _(step, name=name, slots=slots):
                    plgpu.barrier_wait(smem[name].at[lax.rem(step, i32(slots))])

    def quantized_prefill(refs, result, *scratch):
        kernel(refs, result, dict(zip(buffers, scratch, strict=True)))

    out = compat.kernel(
        quantized_prefill,
        out_type=jax.ShapeDtypeStruct(parts.result_shape(form), form.dtype),
        grid=(clusters,),
        grid_names=("nth",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=list(buffers.values()),
        interpret=interpret,
        **parts.cluster_options(cluster),
    )(parts.inputs(operands, form, HALF))
    return out[: form.rows, : form.outputs]


def _summed(
    steps: int, over_step: Callable[[Any, Callable[[Array, Any], None]], None], *, tokens: int, interpreted: bool
) -> Array:
    """float32 sums `[64, tokens]` of the products with which `over_step(step, multiply)` calls `multiply`.

    A product is under way when `multiply` returns, and those but the last `IN_FLIGHT` are done.
    """
    if interpreted:

        def add_step(step, acc):
            sums = [acc]

            def multiply(operand, x_ref):
                sums[0] = sums[0] + parts.interpreted_product(operand, x_ref)

            over_step(step, multiply)
            return sums[0]

        return lax.fori_loop(0, steps, add_step, plgpu.layout_cast(jnp.zeros((ROWS, tokens), jnp.float32), WGMMA))

    def accumulate(acc_ref):
        def multiply(operand, x_ref):
            plgpu.wgmma(acc_ref, operand, x_ref.transpose((1, 0)))
            plgpu.wgmma_wait(IN_FLIGHT)

        @pl.loop(0, steps)
        def _(step):
            over_step(step, multiply)

        return acc_ref[...]

    return pl.run_scoped(accumulate, plgpu.ACC((ROWS, tokens), jnp.float32))
