"""The kernel of fewest tokens: a cluster of CTAs shares the inputs of a tile of outputs, and adds its sums itself.

As in `decode.py` outputs are the rows of the tensor core's tiles and tokens the columns; all tokens are one tile. Each
CTA of a cluster has its own part of the inputs, the same for every tile, and clusters take tiles in turn: cluster n of
N the tiles n, n + N and so on. The loading warpgroup runs ahead from tile to tile. Compute warpgroups of the same
outputs may take turns on the steps of a CTA, which keeps tiles narrow and their last step short.

So a tile's sums are with P warpgroups of the cluster, its parties. One CTA owns the tile, each CTA in turn. The parties
send their sums straight into the shared memory of the owner (st.async), where each has a place and a barrier counts
them. The first warpgroup of the owner adds them to its own in the order of places, whatever order they came in, applies
the scales that waited and writes the finished tile. Nothing depends on timing, and there is nothing to add afterwards.

Why places are free when they are written again. No warpgroup of the owner goes on before the first one of them has read
all its places of the tile. Say that party S sends to owner O for the second time, C tiles after the first. If S is a
warpgroup of O, it went on only then. If not, then S's CTA was itself the owner in between, S went on only when O's sums
were there, and O had sent those after it had read all its places. So no barrier of the cluster says that places are
free; `test_places_are_free_when_they_are_written_again` tries orders. Whoever is written to waits for the writers, and
a barrier of the cluster at the end keeps writers until all is received.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
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
from pallas_kernels.quantized_matmul.mosaic_sm90.parts import ROWS, WGMMA, Form, Forms, Operands, whole

MAX_TOKENS = 32
AUTOMATIC_TOKENS = 16  # with more, tiles of 128 outputs read more bytes of activations than of weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Tiles and split. They change speed and, by the order of summation, rounding.

    Attributes:
      warpgroups: that compute, 2 or 4.
      turns: warpgroups that take turns on the steps of the same 64 outputs, 1 or 2.
      block_k: inputs of a step, 128 or 256; the memory likes the latter's 128 bytes in a row better.
      stages: slots of the ring for each of those that take turns.
      cluster: CTAs that share the inputs of a tile, 2, 4 or 8.
      num_sms: most CTAs. Clusters do not lie across the GPCs of a GPU; of 132 multiprocessors in GPCs of 16 or 18,
        128 are in clusters of 4 or 8.
    """

    warpgroups: int = 4
    turns: int = 2
    block_k: int = 256
    stages: int = 4
    cluster: int = 4
    num_sms: int = 128

    def __post_init__(self):
        if self.warpgroups not in (2, 4):
            raise ValueError(f"warpgroups must be 2 or 4; got {self.warpgroups}")
        if self.turns not in (1, self.warpgroups // 2):  # copies of zeros are of whole 128 bytes
            raise ValueError(f"turns must be 1, or 2 of 4 warpgroups; got {self.turns} of {self.warpgroups}")
        if self.block_k not in (128, 256):
            raise ValueError(f"block_k must be 128 or 256; got {self.block_k}")
        if not 2 <= self.stages * self.turns <= 32:
            raise ValueError(f"stages must make a ring of 2 to 32 slots; got {self.stages} of each of {self.turns}")
        if self.cluster not in (2, 4, 8):
            raise ValueError(f"cluster must be 2, 4 or 8; got {self.cluster}")
        if self.num_sms < self.cluster:
            raise ValueError(f"num_sms must be at least the {self.cluster} CTAs of a cluster; got {self.num_sms}")

    @property
    def rows(self) -> int:
        """Of 64 outputs in a tile."""
        return self.warpgroups // self.turns

    @property
    def block_o(self) -> int:
        return self.rows * ROWS

    @property
    def slots(self) -> int:
        return self.stages * self.turns

    @property
    def parties(self) -> int:
        return self.cluster * self.turns

    @property
    def registers(self) -> tuple[int, int]:
        """Of compute and loading warpgroups; together as many as all of them start with."""
        return (112, 32) if self.warpgroups == 4 else (232, 40)

    def buffers(self, form: Form) -> dict[str, Any]:
        """What the kernel allocates per CTA, by name."""
        tokens = tokens_of(form)
        made = parts.buffers(
            form, stages=self.slots, block_k=self.block_k, outputs=self.block_o, tokens=tokens, cluster=1
        )
        made |= {
            "received": sums(self.rows, self.parties - 1, tokens),
            "arrived": plgpu.Barrier(num_arrivals=self.parties - 1, num_barriers=self.rows),
            "done": plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=self.warpgroups),
        }
        if self.turns > 1:
            made["read"] = plgpu.Barrier(num_arrivals=1, num_barriers=self.rows)
        return made

    def smem_bytes(self, form: Form) -> int:
        return compat.shared_memory_bytes(list(self.buffers(form).values()))


def sums(warpgroups: int, places: int, tokens: int) -> Any:
    shape = (warpgroups, places, ROWS, tokens)
    return plgpu.SMEM(shape, jnp.float32, transforms=compat.swizzled(jnp.float32, tokens))


def tokens_of(form: Form) -> int:
    return whole(form.rows, 8)


def heuristic_config(forms: Forms) -> ClusterConfig:
    """Narrow tiles, and the cluster that leaves fewer multiprocessors idle; the smaller of equals.

    No CTA of a cluster of more than two is without a step.
    """
    form = forms[0]
    narrow_steps = form.width < parts.MAX_WIDTH or form.codes.bits == 8  # 128 bytes in a row either way
    config = ClusterConfig(block_k=128 if narrow_steps else 256, stages=8)
    sizes = [cluster for cluster in (4, 8) if cluster <= form.steps(config.block_k)] or [2]
    configs = [dataclasses.replace(config, cluster=cluster) for cluster in sizes]
    return parts.fitted(max(configs, key=lambda config: busy(forms, config)), form)


def candidates(form: Form) -> Iterator[ClusterConfig]:
    """The configurations that a benchmark may try, each with the longest ring."""
    if form.rows > MAX_TOKENS:
        return
    for warpgroups, turns in ((4, 2), (4, 1), (2, 1)):
        for block_k, cluster in itertools.product((256, 128), (4, 8, 2)):
            config = ClusterConfig(warpgroups=warpgroups, turns=turns, block_k=block_k, stages=2, cluster=cluster)
            if config.smem_bytes(form) <= compat.SHARED_MEMORY_BYTES:
                yield parts.fitted(dataclasses.replace(config, stages=8), form)


def busy(forms: Forms, config: ClusterConfig) -> float:
    """The share of clusters that have a tile, in the mean of the rounds."""
    tiles, most = int(first_tiles(forms, config)[-1]), config.num_sms // config.cluster
    return tiles / whole(tiles, most)


def first_tiles(forms: Forms, config: ClusterConfig) -> np.ndarray:
    """First tile of each weight, and how many all have."""
    return parts.first_tiles(forms, config.block_o)


def clusters_of(forms: Forms, config: ClusterConfig) -> int:
    """As few as need no more rounds than the most there may be."""
    tiles = int(first_tiles(forms, config)[-1])
    rounds = -(-tiles // (config.num_sms // config.cluster))
    return -(-tiles // rounds)


@functools.partial(jax.jit, static_argnames=("forms", "config", "interpret"))
def run(
    operands: tuple[Operands, ...], *, forms: Forms, config: ClusterConfig, interpret
) -> tuple[Float[Array, "M O"], ...]:
    results = multiply(operands, forms=forms, config=config, interpret=interpret)
    columns = first_tiles(forms, config) * config.block_o
    return tuple(
        results[: form.rows, first : first + form.outputs] for form, first in zip(forms, columns.tolist(), strict=False)
    )


def multiply(
    operands: tuple[Operands, ...], *, forms: Forms, config: ClusterConfig, interpret
) -> Float[Array, "rows columns"]:
    """The results of all weights side by side, in whole tiles."""
    form, tokens, interpreted = forms[0], tokens_of(forms[0]), interpret is not None
    tiles, clusters = first_tiles(forms, config), clusters_of(forms, config)
    steps, cluster, turns, slots = form.steps(config.block_k), config.cluster, config.turns, config.slots
    i32 = jnp.int32

    def kernel(refs, out_ref, smem):
        warpgroup, nth, rank = (lax.axis_index(name) for name in ("warpgroup", "nth", "cluster"))
        first_step = lax.div(rank * steps, i32(cluster))
        share = lax.div((rank + 1) * steps, i32(cluster)) - first_step  # of the steps of each tile
        rounds = lax.div(int(tiles[-1]) - 1 - nth, i32(clusters)) + 1

        def tile_of(round):
            return nth + round * clusters

        def holds(weight, tile):
            """Whether a tile is one of this weight."""
            return (int(tiles[weight]) <= tile) & (tile < int(tiles[weight + 1]))

        def first_output(weight, tile):
            """Of a tile, in its weight."""
            return (tile - int(tiles[weight])) * config.block_o

        def added(acc, row):
            """With the sums of all other parties."""
            plgpu.barrier_wait(smem["arrived"].at[row])
            for place in range(1, config.parties):
                acc = acc + plgpu.load(smem["received"].at[row, place - 1], layout=WGMMA)
            if turns > 1:
                plgpu.barrier_arrive(smem["read"].at[row])
            return acc

        def finish(acc, tile, row):
            for weight, of_weight in enumerate(forms):

                def of_this(acc, weight=weight, of_weight=of_weight):
                    output = first_output(weight, tile) + row * ROWS
                    return parts.finished(acc, refs[weight], of_weight, output=output)

                if len(forms) == 1:
                    acc = of_this(acc)
                elif of_weight.is_unfinished:
                    acc = lax.cond(holds(weight, tile), of_this, lambda acc: acc, acc)
            result = out_ref.at[:, pl.ds(tile * config.block_o + row * ROWS, ROWS)]
            acc = plgpu.layout_cast(acc.astype(form.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            result.transpose((1, 0))[...] = acc

        @pl.when(warpgroup < config.warpgroups)
        def compute():
            plgpu.set_max_registers(config.registers[0], action="increase")
            row, turn = lax.rem(warpgroup, i32(config.rows)), lax.div(warpgroup, i32(config.rows))

            def own_before(unit):
                """How many of the units before this one are this warpgroup's."""
                return lax.div(unit + (turns - 1 - turn), i32(turns))

            def over_own_units(own, acc):
                slot = lax.rem(own * turns + turn, i32(slots))
                plgpu.barrier_wait(smem["ready"].at[slot])
                acc = parts.add_step(acc, smem, form, slot=slot, warpgroup=row, interpreted=interpreted)
                plgpu.barrier_arrive(smem["free"].at[slot])
                return acc

            @pl.loop(0, rounds)
            def over_tiles(round):
                acc = plgpu.layout_cast(jnp.zeros((ROWS, tokens), jnp.float32), WGMMA)
                acc = lax.fori_loop(own_before(round * share), own_before((round + 1) * share), over_own_units, acc)
                owner = lax.rem(round, i32(cluster))
                place = lax.rem((rank - owner + cluster) * turns + turn, i32(config.parties))
                to = {"row": row, "place": place, "owner": owner}
                if interpreted:
                    send_by_global_memory(acc, smem, config, **to, own=(nth, warpgroup))
                else:
                    pl.when(place > 0)(lambda: send(acc, smem, **to))

                pl.when(place == 0)(lambda: finish(added(acc, row), tile_of(round), row))
                if turns > 1:
                    pl.when((rank == owner) & (place > 0))(lambda: plgpu.barrier_wait(smem["read"].at[row]))

            plgpu.barrier_arrive(smem["done"])
            plgpu.barrier_wait(smem["done"])

        @pl.when(warpgroup == config.warpgroups)
        def load():
            plgpu.set_max_registers(config.registers[1], action="decrease")
            units = rounds * share

            def over_units(unit, at):
                tile, step = at
                slot = lax.rem(unit, i32(slots))

                @pl.when(unit >= slots)
                def _():
                    plgpu.barrier_wait(smem["free"].at[slot])
                    plgpu.commit_smem()  # ordinary reads of the slot before the next TMA

                for weight, of_weight in enumerate(forms):

                    def load_here(weight=weight, of_weight=of_weight):
                        where = {"step": first_step + step, "slot": slot, "output": first_output(weight, tile)}
                        parts.load_step(refs[weight], smem, of_weight, **where, token=0, cluster=1)

                    if len(forms) == 1:
                        load_here()
                    else:
                        pl.when(holds(weight, tile))(load_here)
                is_last = step == share - 1
                return jnp.where(is_last, tile + clusters, tile), jnp.where(is_last, 0, step + 1)

            lax.fori_loop(0, units, over_units, (nth, i32(0)))

            # Every completion of a barrier must be observed before the kernel ends.
            @pl.loop(jnp.maximum(units - slots, 0), units)
            def _(unit):
                plgpu.barrier_wait(smem["free"].at[lax.rem(unit, i32(slots))])

    results: tuple[Any, ...] = (jax.ShapeDtypeStruct((tokens, int(tiles[-1]) * config.block_o), form.dtype),)
    buffers = config.buffers(form)
    if interpreted:
        mail = (clusters, cluster, config.rows, config.parties - 1, ROWS, tokens)
        results = (*results, jax.ShapeDtypeStruct(mail, jnp.float32))
        buffers |= {
            "sent": sums(config.warpgroups, 1, tokens),
            "met": plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=turns, num_barriers=config.rows),
        }

    def quantized_decode(refs, result, *others):
        names = [*("mail" for _ in results[1:]), *buffers]
        kernel(refs, result, dict(zip(names, others, strict=True)))

    result, *_ = compat.kernel(
        quantized_decode,
        out_type=results,
        grid=(clusters,),
        grid_names=("nth",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=list(buffers.values()),
        interpret=interpret,
        **parts.cluster_options(cluster),
    )(tuple(parts.inputs(of_weight, form) for of_weight, form in zip(operands, forms, strict=True)))
    return result


def send(acc: Array, smem: dict, *, row: Any, place: Any, owner: Any) -> None:
    """To a place, not the first, at the owner, whose barrier counts this warpgroup and its bytes."""
    received, arrived = smem["received"].at[row, place - 1], smem["arrived"].at[row]
    plgpu.async_store_smem(acc, received, arrived, cluster_idx=owner, cluster_dim="cluster")


def send_by_global_memory(
    acc: Array, smem: dict, config: ClusterConfig, *, row: Any, place: Any, owner: Any, own: tuple[Any, Any]
) -> None:
    """The same for the interpreter, which does not know how to `send`: all parties meet when all have written.

    `own` are the numbers of the cluster and of the warpgroup.
    """
    nth, warpgroup = own
    mail, received = smem["mail"].at[nth, owner, row], smem["received"].at[row]

    @pl.when(place > 0)
    def _():
        sent = smem["sent"].at[warpgroup, 0]
        sent[...] = acc
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(sent, mail.at[place - 1])
        plgpu.wait_smem_to_gmem(0)

    plgpu.barrier_arrive(smem["met"].at[row])
    plgpu.barrier_wait(smem["met"].at[row])

    @pl.when(place == 0)
    def _():
        plgpu.commit_smem()  # ordinary reads of the places before the next TMA
        for i in range(config.parties - 1):
            plgpu.copy_gmem_to_smem(mail.at[i], received.at[i], smem["arrived"].at[row])
