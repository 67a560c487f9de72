"""The kernel of few tokens: the inputs are split too, so that all multiprocessors read weights.

The product is computed as `y^T = W x^T`: outputs are the rows of the tensor core's tiles, tokens the columns. A CTA has
a few compute warpgroups of 64 outputs each and one that fills the ring by TMA.

Few tokens are bound by the memory and as much by making operands of codes and multiplying with them (README). Half of
the warpgroups begin a step when their own codes have come, so that some make operands while others multiply.

A unit of work is one step, a few inputs, of one tile of outputs and tokens; up to 128 tokens are one tile, and every
weight is then read once. Units are numbered with the steps of a tile in a row, and every CTA takes the same number of
consecutive ones; so a tile's inputs are split where the borders fall, and a CTA may begin in one tile and go on in the
next without emptying its ring. What it has of each tile is a float32 partial result. The partial results of a tile are
added in the order of the inputs, by XLA or by the kernel that reads them next; nothing depends on timing.

Several weights with as many inputs, such as those of queries, keys and values, are multiplied in one launch: the tiles
of one follow those of the other, each with activations of its own.

The activations come from the L2 cache once for every tile of outputs, and more tokens are more bytes than the weights.
The CTAs of a cluster then work side by side on tiles of different outputs, and each loads a part of the activations
for all.
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
from pallas_kernels.partial import Partial
from pallas_kernels.quantized_matmul.mosaic_sm90 import parts
from pallas_kernels.quantized_matmul.mosaic_sm90.parts import ROWS, WGMMA, Form, Operands, whole

MAX_TOKENS = 128  # of a tile

Forms = tuple[Form, ...]  # of the weights of a launch; they differ in their outputs and layers alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tiles and split. They change speed and, by the order of summation, rounding.

    Attributes:
      warpgroups: that compute, 64 outputs each; 4 have registers for tiles of 64 tokens.
      block_k: inputs of a step, 128 or 256; the memory likes the latter's 128 bytes in a row better.
      stages: slots of the ring.
      cluster: CTAs that share the activations that they load, 1, 2 or 4.
      num_sms: most CTAs.
    """

    warpgroups: int = 4
    block_k: int = 128
    stages: int = 6
    cluster: int = 1
    num_sms: int = 132

    def __post_init__(self):
        if self.warpgroups not in (2, 4):  # copies of zeros are of whole 128 bytes
            raise ValueError(f"warpgroups must be 2 or 4; got {self.warpgroups}")
        if self.block_k not in (128, 256):
            raise ValueError(f"block_k must be 128 or 256; got {self.block_k}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2; got {self.stages}")
        if self.cluster not in (1, 2, 4):
            raise ValueError(f"cluster must be 1, 2 or 4; got {self.cluster}")
        if self.num_sms < self.cluster:
            raise ValueError(f"num_sms must be at least the {self.cluster} CTAs of a cluster; got {self.num_sms}")

    @property
    def block_o(self) -> int:
        return self.warpgroups * ROWS

    @property
    def registers(self) -> tuple[int, int]:
        """Of compute and loading warpgroups; together as many as all of them start with."""
        return (112, 32) if self.warpgroups == 4 else (232, 40)

    def buffers(self, form: Form) -> dict[str, Any]:
        """What the kernel allocates per CTA, by name."""
        tokens = tokens_of(form, self.cluster)
        ring = parts.buffers(
            form,
            stages=self.stages,
            block_k=self.block_k,
            outputs=self.block_o,
            tokens=tokens,
            cluster=self.cluster,
        )
        return ring | {"result": parts.result_buffer(self.warpgroups, tokens, jnp.float32)}

    def smem_bytes(self, form: Form) -> int:
        return compat.shared_memory_bytes(list(self.buffers(form).values()))


def tokens_of(form: Form, cluster: int = 1) -> int:
    """Tokens of a tile: all of them or an even share, in eights for each CTA that loads a part."""
    tiles = -(-form.rows // MAX_TOKENS)
    return whole(-(-form.rows // tiles), 8 * cluster)


def heuristic_config(forms: Forms) -> Config:
    """A CTA for each multiprocessor, and tiles that are wide, since each reads the activations, while registers allow.

    With more than 32 tokens narrow ones where a tile is split into many partial results, since these are wide too.
    """
    form = forms[0]
    tokens = tokens_of(form)
    narrow_steps = form.width < parts.MAX_WIDTH or not form.takes(256)
    if tokens <= 32:
        narrow_steps = narrow_steps or form.codes.bits == 8  # 128 bytes in a row either way
        config = Config(warpgroups=4, block_k=128 if narrow_steps else 256, stages=6 if narrow_steps else 3)
        return parts.fitted(config, form)
    wide = Config(warpgroups=4, block_k=128, stages=4, cluster=1 if tokens > 48 else 2)  # a cluster needs registers
    if tokens <= 64 and cut_of(forms, wide).counts.max() <= 4:
        return parts.fitted(wide, form)
    block_k = 128 if narrow_steps or tokens > 64 or form.codes.bits == 8 else 256
    return parts.fitted(Config(warpgroups=2, block_k=block_k, stages=4, cluster=2), form)


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the units are dealt out; a tile is what a cluster works on at a time."""

    output_tiles: int
    token_tiles: int
    steps: int  # of a tile
    share: int  # units of a cluster
    clusters: int

    @property
    def tiles(self) -> int:
        return self.output_tiles * self.token_tiles

    @property
    def counts(self) -> np.ndarray:
        """Clusters that share each tile `[output tiles, token tiles]`."""
        first = np.arange(self.tiles) * self.steps
        counts = (first + self.steps - 1) // self.share - first // self.share + 1
        return counts.reshape(self.output_tiles, self.token_tiles)


def cut_of(forms: Forms, config: Config) -> Cut:
    form = forms[0]
    output_tiles = int(first_tiles(forms, config)[-1])
    token_tiles = -(-form.rows // tokens_of(form, config.cluster))
    units = output_tiles * token_tiles * form.steps(config.block_k)
    share = -(-units // (config.num_sms // config.cluster))
    return Cut(output_tiles, token_tiles, form.steps(config.block_k), share, -(-units // share))


def first_tiles(forms: Forms, config: Config) -> np.ndarray:
    """First tile of outputs of each weight, and how many all have."""
    return np.cumsum([0, *(-(-form.outputs // (config.block_o * config.cluster)) for form in forms)])


def first_columns(forms: Forms, config: Config) -> list[int]:
    """Where the results of each weight begin among all columns, and how many there are in whole tiles of the TMA."""
    first = [int(tile) * config.block_o * config.cluster for tile in first_tiles(forms, config)[:-1]]
    return [*first, first[-1] + parts.result_shape(forms[-1])[1]]


@functools.partial(jax.jit, static_argnames=("forms", "config", "interpret", "merged"))
def run(
    operands: tuple[Operands, ...], *, forms: Forms, config: Config, interpret, merged: bool = True
) -> tuple[Float[Array, "M O"] | Partial, ...]:
    """The products; not `merged`, as partial results where every tile has as many."""
    partial = multiply(operands, forms=forms, config=config, interpret=interpret)
    columns = [*zip(forms, first_columns(forms, config), strict=False)]
    counts = cut_of(forms, config).counts
    if not merged and counts.min() == counts.max():
        return tuple(
            Partial(partial, first, form.outputs, (form.rows, form.outputs), form.dtype) for form, first in columns
        )
    return tuple(
        merge(partial, forms, config, rows=form.rows, columns=slice(first, first + form.outputs)).astype(form.dtype)
        for form, first in columns
    )


def merge(
    partial: Float[Array, "J rows columns"], forms: Forms, config: Config, *, rows: int, columns: slice
) -> Float[Array, "M O"]:
    """The sum of the partial results of each tile, first to last, of the first `rows` and some columns.

    Those that nobody wrote are memory as it was.
    """
    counts = cut_of(forms, config).counts
    total = partial[0, :rows, columns]
    for j in range(1, counts.max()):
        part = partial[j, :rows, columns]
        by_column = np.repeat((counts > j).T, config.block_o * config.cluster, axis=1)[:, columns]
        if by_column.all():
            total = total + part
            continue
        by_row = jnp.repeat(jnp.asarray(by_column), tokens_of(forms[0], config.cluster), axis=0)[:rows]
        total = total + jnp.where(by_row, part, 0.0)
    return total


def multiply(
    operands: tuple[Operands, ...], *, forms: Forms, config: Config, interpret
) -> Float[Array, "J rows columns"]:
    """Partial results, as many as the most that a tile has."""
    form, cut, stages, cluster = forms[0], cut_of(forms, config), config.stages, config.cluster
    tiles, tokens, interpreted = first_tiles(forms, config), tokens_of(form, cluster), interpret is not None
    i32 = jnp.int32

    def kernel(refs, partial_ref, smem):
        warpgroup, nth = lax.axis_index("warpgroup"), lax.axis_index("nth")
        rank = lax.axis_index("cluster") if cluster > 1 else 0
        first = nth * cut.share
        last = jnp.minimum(first + cut.share, cut.tiles * cut.steps)

        def corner(tile, before=0):
            """First output and first token of this CTA, of a weight before which there are so many tiles of outputs."""
            output, token = lax.div(tile, i32(cut.token_tiles)), lax.rem(tile, i32(cut.token_tiles))
            return ((output - before) * cluster + rank) * config.block_o, token * tokens

        def holds(weight, tile):
            """Whether a tile is one of this weight."""
            begin, end = (int(x) * cut.token_tiles for x in tiles[weight : weight + 2])
            return (begin <= tile) & (tile < end)

        @pl.when(warpgroup < config.warpgroups)
        def compute():
            plgpu.set_max_registers(config.registers[0], action="increase")
            result = smem["result"].at[warpgroup]

            def over_units(unit, acc):
                slot = lax.rem(unit - first, i32(stages))
                parts.await_step(smem, slot=slot, warpgroup=warpgroup)
                acc = parts.add_step(acc, smem, form, slot=slot, warpgroup=warpgroup, interpreted=interpreted)
                parts.release(smem["free"].at[slot], cluster)
                return acc

            @pl.loop(lax.div(first, i32(cut.steps)), lax.div(last - 1, i32(cut.steps)) + 1)
            def over_tiles(tile):
                begin = jnp.maximum(first, tile * cut.steps)
                end = jnp.minimum(last, (tile + 1) * cut.steps)
                acc = plgpu.layout_cast(jnp.zeros((ROWS, tokens), jnp.float32), WGMMA)
                acc = lax.fori_loop(begin, end, over_units, acc)
                output, token = corner(tile)
                for weight, of_weight in enumerate(forms):

                    def finish(acc, weight=weight, of_weight=of_weight):
                        output, _ = corner(tile, int(tiles[weight]))
                        where = {"layer": parts.layer_of(refs[weight], of_weight), "output": output + warpgroup * ROWS}
                        return parts.finished(acc, of_weight, parts.late_scales(refs[weight], of_weight, **where))

                    if len(forms) == 1:
                        acc = finish(acc)
                    elif of_weight.has_late_scales:
                        acc = lax.cond(holds(weight, tile), finish, lambda acc: acc, acc)
                if len(forms) > 1 and not form.has_late_scales:
                    acc = parts.finished(acc, form)
                where = (nth - lax.div(tile * cut.steps, i32(cut.share)), pl.ds(token, tokens))
                parts.store(acc, result, partial_ref.at[*where, pl.ds(output + warpgroup * ROWS, ROWS)])
                parts.await_stores()

        @pl.when(warpgroup == config.warpgroups)
        def load():
            plgpu.set_max_registers(config.registers[1], action="decrease")
            layers = [parts.layer_of(of_refs, of_weight) for of_refs, of_weight in zip(refs, forms, strict=True)]

            @pl.loop(first, last)
            def over_units(unit):
                slot = lax.rem(unit - first, i32(stages))

                @pl.when(unit - first >= stages)
                def _():
                    plgpu.barrier_wait(smem["free"].at[slot])
                    plgpu.commit_smem()  # ordinary reads of the slot before the next TMA

                tile, step = lax.div(unit, i32(cut.steps)), lax.rem(unit, i32(cut.steps))
                for weight, of_weight in enumerate(forms):

                    def load_here(weight=weight, of_weight=of_weight):
                        output, token = corner(tile, int(tiles[weight]))
                        where = {"layer": layers[weight], "step": step, "slot": slot, "output": output, "token": token}
                        parts.load_step(refs[weight], smem, of_weight, **where, cluster=cluster)

                    if len(forms) == 1:
                        load_here()
                    else:
                        pl.when(holds(weight, tile))(load_here)

            # Every completion of a barrier must be observed before the kernel ends.
            @pl.loop(jnp.maximum(last - stages, first), last)
            def _(unit):
                plgpu.barrier_wait(smem["free"].at[lax.rem(unit - first, i32(stages))])

    buffers = config.buffers(form)

    def quantized_decode(refs, result, *scratch):
        kernel(refs, result, dict(zip(buffers, scratch, strict=True)))

    return compat.kernel(
        quantized_decode,
        out_type=jax.ShapeDtypeStruct(
            (int(cut.counts.max()), parts.result_shape(form)[0], first_columns(forms, config)[-1]), jnp.float32
        ),
        grid=(cut.clusters,),
        grid_names=("nth",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=list(buffers.values()),
        interpret=interpret,
        **parts.cluster_options(cluster),
    )(tuple(parts.inputs(of_weight, form) for of_weight, form in zip(operands, forms, strict=True)))
