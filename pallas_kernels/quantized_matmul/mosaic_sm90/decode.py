"""The kernel of few tokens: the inputs are split too, so that all multiprocessors read weights.

The product is computed as `y^T = W x^T`: outputs are the rows of the tensor core's tiles, tokens the columns. A CTA has
a few compute warpgroups of 64 outputs each and one that fills the ring by TMA.

A unit of work is one step, 128 inputs, of one tile of outputs and tokens; up to 128 tokens are one tile, and every
weight is then read once. Units are numbered with the steps of a tile in a row, and every CTA takes the same number of
consecutive ones; so a tile's inputs are split where the borders fall, and a CTA may begin in one tile and go on in the
next without emptying its ring. What it has of each tile is a float32 partial result. The partial results of a tile are
added in the order of the inputs, by XLA; nothing depends on timing.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import compat
from pallas_kernels.quantized_matmul.mosaic_sm90 import parts
from pallas_kernels.quantized_matmul.mosaic_sm90.parts import ROWS, WGMMA, Form, whole

MAX_TOKENS = 128  # of a tile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tiles and split. They change speed and, by the order of summation, rounding.

    Attributes:
      warpgroups: that compute, 64 outputs each; 4 have registers for tiles of 32 tokens.
      stages: slots of the ring.
      num_sms: most CTAs.
    """

    warpgroups: int = 4
    stages: int = 6
    num_sms: int = 132

    def __post_init__(self):
        if self.warpgroups not in (2, 4):  # copies of zeros are of whole 128 bytes
            raise ValueError(f"warpgroups must be 2 or 4; got {self.warpgroups}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2; got {self.stages}")
        if self.num_sms < 1:
            raise ValueError(f"num_sms must be at least 1; got {self.num_sms}")

    @property
    def block_o(self) -> int:
        return self.warpgroups * ROWS

    def buffers(self, form: Form) -> dict[str, Any]:
        """What the kernel allocates per CTA, by name."""
        return parts.buffers(form, stages=self.stages, outputs=self.block_o, tokens=tokens_of(form))

    def smem_bytes(self, form: Form) -> int:
        return compat.shared_memory_bytes(list(self.buffers(form).values()))


def tokens_of(form: Form) -> int:
    """Tokens of a tile: all of them, in eights, or an even share."""
    tiles = -(-form.rows // MAX_TOKENS)
    return whole(-(-form.rows // tiles), 8)


def heuristic_config(form: Form) -> Config:
    """A CTA for each multiprocessor; wide tiles, which read the activations less often, while registers allow."""
    tokens = tokens_of(form)
    if tokens <= 32:
        return Config(warpgroups=4, stages=6)
    return Config(warpgroups=2, stages=6 if tokens <= 64 else 4)


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the units are dealt out."""

    output_tiles: int
    token_tiles: int
    steps: int  # of a tile
    per_cta: int  # units
    ctas: int

    @property
    def tiles(self) -> int:
        return self.output_tiles * self.token_tiles

    def first_cta(self, tile: Any) -> Any:
        """The CTA that has a tile's first unit."""
        return tile * self.steps // self.per_cta

    @property
    def counts(self) -> np.ndarray:
        """CTAs that share each tile."""
        tiles = np.arange(self.tiles)
        return ((tiles + 1) * self.steps - 1) // self.per_cta - self.first_cta(tiles) + 1


def cut_of(form: Form, config: Config) -> Cut:
    output_tiles, token_tiles = -(-form.outputs // config.block_o), -(-form.rows // tokens_of(form))
    units = output_tiles * token_tiles * form.steps
    per_cta = -(-units // config.num_sms)
    return Cut(output_tiles, token_tiles, form.steps, per_cta, -(-units // per_cta))


@functools.partial(jax.jit, static_argnames=("form", "config", "interpret"))
def run(
    x: Array, codes: Array, scales: Array, zeros: Array | None, layer: Array, *, form: Form, config: Config, interpret
) -> Float[Array, "M O"]:
    partial = multiply(x, codes, scales, zeros, layer, form=form, config=config, interpret=interpret)
    return merge(partial, cut_of(form, config))[: form.rows, : form.outputs].astype(form.dtype)


def merge(partial: Float[Array, "J tiles outputs tokens"], cut: Cut) -> Float[Array, "all_tokens all_outputs"]:
    """The sum of the partial results of each tile, first to last. Those that no CTA wrote are memory as it was."""
    total = partial[0]
    for j in range(1, partial.shape[0]):
        there = cut.counts > j
        total = total + (partial[j] if there.all() else jnp.where(jnp.asarray(there)[:, None, None], partial[j], 0.0))
    _, outputs, tokens = total.shape
    total = total.reshape(cut.output_tiles, cut.token_tiles, outputs, tokens)
    return jnp.transpose(total, (1, 3, 0, 2)).reshape(cut.token_tiles * tokens, cut.output_tiles * outputs)


def multiply(x, codes, scales, zeros, layer, *, form: Form, config: Config, interpret) -> Array:
    """Partial results `[most per tile, tiles, outputs of a tile, tokens in eights]`."""
    cut, stages = cut_of(form, config), config.stages
    tokens = tokens_of(form)
    i32 = jnp.int32

    def kernel(refs, partial_ref, smem):
        warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
        first = cta * cut.per_cta
        last = jnp.minimum(first + cut.per_cta, cut.tiles * cut.steps)

        @pl.when(warpgroup < config.warpgroups)
        def compute():
            plgpu.set_max_registers(104 if config.warpgroups == 4 else 224, action="increase")

            def over_units(unit, acc):
                slot = lax.rem(unit - first, i32(stages))
                plgpu.barrier_wait(smem["ready"].at[slot])
                acc = parts.add_step(acc, smem, form, slot=slot, warpgroup=warpgroup, interpreted=interpret is not None)
                plgpu.barrier_arrive(smem["free"].at[slot])
                return acc

            @pl.loop(lax.div(first, i32(cut.steps)), lax.div(last - 1, i32(cut.steps)) + 1)
            def over_tiles(tile):
                begin = jnp.maximum(first, tile * cut.steps)
                end = jnp.minimum(last, (tile + 1) * cut.steps)
                acc = plgpu.layout_cast(jnp.zeros((ROWS, tokens), jnp.float32), WGMMA)
                acc = lax.fori_loop(begin, end, over_units, acc)
                nth = cta - lax.div(tile * cut.steps, i32(cut.per_cta))
                partial_ref[nth, tile, pl.ds(warpgroup * ROWS, ROWS), :] = acc

        @pl.when(warpgroup == config.warpgroups)
        def load():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(first, last)
            def over_units(unit):
                slot = lax.rem(unit - first, i32(stages))

                @pl.when(unit - first >= stages)
                def _():
                    plgpu.barrier_wait(smem["free"].at[slot])
                    plgpu.commit_smem()  # ordinary reads of the slot before the next TMA

                tile, step = lax.div(unit, i32(cut.steps)), lax.rem(unit, i32(cut.steps))
                output, token = lax.div(tile, i32(cut.token_tiles)), lax.rem(tile, i32(cut.token_tiles))
                output, token = output * config.block_o, token * tokens
                parts.load_step(refs, smem, form, step=step, slot=slot, output=output, token=token)

            # Every completion of a barrier must be observed before the kernel ends.
            @pl.loop(jnp.maximum(last - stages, first), last)
            def _(unit):
                plgpu.barrier_wait(smem["free"].at[lax.rem(unit - first, i32(stages))])

    buffers = config.buffers(form)
    return compat.kernel(
        lambda refs, result, *scratch: kernel(refs, result, dict(zip(buffers, scratch, strict=True))),
        out_type=jax.ShapeDtypeStruct((int(cut.counts.max()), cut.tiles, config.block_o, tokens), jnp.float32),
        grid=(cut.ctas,),
        grid_names=("cta",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=list(buffers.values()),
        interpret=interpret,
    )(parts.inputs(x, codes, scales, zeros, layer, form))
