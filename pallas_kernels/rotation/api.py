"""`pairwise_rotation` and `pairwise_rotations`: argument checks and the choice of implementation."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, partitioning
from pallas_kernels.norm_rope import rms_norm
from pallas_kernels.partial import Partial, made, unless_mapped
from pallas_kernels.rotation import mosaic_sm90, reference, xla
from pallas_kernels.rotation.source import Gated, Normed, Source, operands, with_operands
from pallas_kernels.rotation.turn import Turn

NAMES = ("mosaic", "xla", "reference")


def pairwise_rotation(
    x: Float[Array, "*rows I"],
    theta: Float[Array, "R half"],
    pairs: Int[Array, "R I"],
    channel_scales: Float[Array, "I"] | None = None,
    *,
    group_size: int,
    inverse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "*rows I"]:
    """Scales channels, then applies R steps of disjoint Givens rotations within groups (ParoQuant, arXiv 2511.10645).

    Step r turns channels i and j of a pair by its angle: `x_i' = cos x_i + sin x_j`, `x_j' = cos x_j - sin x_i`. The
    whole is `x * channel_scales` times an orthogonal matrix that is block-diagonal in the groups. Computed in float32
    (float64 for float64 inputs), rounded once at the end. Differentiable in x, theta and channel_scales.

    Args:
      x: rows of activations, or of a weight `[O, I]`.
      theta: angle in radians of pair t of group k at `[r, k * group_size / 2 + t]`.
      pairs: within each group and step a permutation of 0..group_size - 1; pair t is its elements 2 t and 2 t + 1.
      channel_scales: factor of each channel before the first step; None: 1. Not with `inverse`.
      group_size: channels of a group, even, divides I.
      inverse: apply the transposed matrix instead: the steps in reverse order with negative angles.
      implementation: "mosaic", "xla" or "reference"; None is the automatic choice. "mosaic", the Hopper kernel, rotates
        forwards; its gradients are those of "xla". On a mesh of automatic axes each device turns its rows and groups.

    Raises:
      ValueError: arguments that do not fit together.
      NotImplementedError: "mosaic" cannot run this call, and why.
    """
    if inverse and channel_scales is not None:
        raise ValueError("channel_scales come before the rotation and have no place in its inverse")
    turn = Turn(theta, pairs, channel_scales)
    (result,) = _run(x, (turn,), group_size=group_size, inverse=inverse, implementation=implementation)
    return result


def pairwise_rotations(
    x: Float[Array, "*rows I"],
    turns: Sequence[Turn],
    *,
    group_size: int,
    implementation: str | None = None,
) -> tuple[Float[Array, "*rows I"], ...]:
    """`pairwise_rotation` of the same rows by each of the turns, which the Hopper kernel does in one launch.

    A turn may have no rotation, only scales or nothing. One whose arrays are stacked along a first axis has the index
    of its layer.
    """
    return _run(x, tuple(turns), group_size=group_size, inverse=False, implementation=implementation)


def normed_rotations(
    rows: Normed, turns: Sequence[Turn], *, group_size: int, implementation: str | None = None
) -> tuple[Float[Array, "*rows I"], tuple[Float[Array, "*rows I"], ...]]:
    """The sum of which `rows` are the norm, and `pairwise_rotations` of the norm, in one launch of the Hopper kernel.

    Sum and norm are rounded to their dtype as arrays are. On a mesh each device has its rows with all channels.
    """
    if rows.weight.shape != rows.shape[-1:]:
        raise ValueError(f"the weight of a norm must have shape {rows.shape[-1:]}; got {rows.weight.shape}")
    if rows.y is not None and (rows.y.shape != rows.shape or rows.y.dtype != rows.dtype):
        raise ValueError(
            f"what is added to {rows.dtype} {rows.shape} must be like it; got {rows.y.dtype} {rows.y.shape}"
        )
    results = _run(rows, tuple(turns), group_size=group_size, inverse=False, implementation=implementation)
    return results[0], results[1:]


def gated_rotations(
    rows: Gated, turns: Sequence[Turn], *, group_size: int, implementation: str | None = None
) -> tuple[Float[Array, "*rows I"], ...]:
    """`pairwise_rotations` of gated rows, in one launch of the Hopper kernel, which rounds them once."""
    if rows.y.shape != rows.shape or rows.y.dtype != rows.dtype:
        raise ValueError(
            f"a gate of {rows.dtype} {rows.shape} needs as many of its dtype; got {rows.y.dtype} {rows.y.shape}"
        )
    return _run(rows, tuple(turns), group_size=group_size, inverse=False, implementation=implementation)


def _run(
    x: Source,
    turns: tuple[Turn, ...],
    *,
    group_size: int,
    inverse: bool,
    implementation: str | None,
) -> tuple[Array, ...]:
    """What the kernel gives: of norms their sum first."""
    if implementation not in (None, *NAMES):
        raise ValueError(f"implementation must be None or one of {[*NAMES]}; got {implementation!r}")
    if len(x.shape) < 1 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating with at least one axis; got {x.dtype} of shape {x.shape}")
    for turn in turns:
        _check(turn, x.shape[-1], group_size)
    rows = _flat(x)
    if implementation is None:
        implementation, _ = automatic(rows, turns, group_size=group_size, inverse=inverse)
    elif implementation == "mosaic" and (
        reason := dispatch.undivided(is_cut=True)
        or mosaic_sm90.unsupported(rows, turns, group_size=group_size, inverse=inverse)
    ):
        raise NotImplementedError(f'pairwise_rotation "mosaic": {reason}')
    if implementation == "mosaic":
        results = _on_hopper(rows, turns, group_size)
    else:
        run = reference.run if implementation == "reference" else xla.run
        results = _plain(run, rows, turns, group_size, inverse=inverse)
    return tuple(result.reshape(x.shape) for result in results)


def _flat(x: Source) -> Source:
    """With one axis of rows."""
    return x.flat() if isinstance(x, Normed | Gated) else x.reshape((math.prod(x.shape[:-1]), x.shape[-1]))


def _check(turn: Turn, channels: int, group_size: int) -> None:
    if group_size < 2 or group_size % 2 or channels % group_size:
        raise ValueError(f"group_size must be even and divide the {channels} channels of x; got {group_size}")
    stack = () if turn.layer is None else next((part.shape[:1] for part in turn[:3] if part is not None), ())
    if turn.channel_scales is not None and turn.channel_scales.shape != (*stack, channels):
        raise ValueError(f"channel_scales must have shape {(*stack, channels)}; got {turn.channel_scales.shape}")
    if turn.pairs is None and turn.theta is None:
        return
    theta, pairs = turn.theta.shape[len(stack) :], turn.pairs.shape[len(stack) :]
    if len(pairs) != 2 or pairs[1] != channels or not jnp.issubdtype(turn.pairs.dtype, jnp.integer):
        raise ValueError(
            f"pairs must be integers of shape [R, {channels}]; got {turn.pairs.dtype} of shape {turn.pairs.shape}"
        )
    if theta != (pairs[0], channels // 2):
        raise ValueError(f"theta must have shape {(*stack, pairs[0], channels // 2)}; got {turn.theta.shape}")


def automatic(x: Any, turns: tuple[Turn, ...], *, group_size: int, inverse: bool = False) -> tuple[str, str]:
    """The implementation that a call without a name takes, and why no other, in words; rows are `[M, I]`."""
    if not x.shape[0] or not turns:
        return "xla", "nothing to do"
    if (reason := dispatch.undivided(is_cut=True)) is not None:
        return "xla", f"mosaic: {reason}"
    source = "gated" if isinstance(x, Gated) else ""
    if isinstance(x, Normed):
        source = "normed" if x.y is None else "normed sum"
    kind = dispatch.RotationKind(group_size, turns[0].steps, str(x.dtype), source)
    sizes = {"rows": x.shape[0], "channels": x.shape[1], "rotations": len(turns)}
    (first, *_), reason = dispatch.preferred("pairwise_rotation", kind, sizes, gradients=False)
    if first == "mosaic":
        why_not = mosaic_sm90.unsupported(x, turns, group_size=group_size, inverse=inverse)
        if why_not is not None:
            return "xla", f"mosaic: {why_not}"
    return first, reason


NORM_GROUP = 128  # where norms are all there is to make


def makes_rows(rows: Normed | Gated, turns: Sequence[Turn], *, group_size: int) -> bool:
    """Whether the kernel is the fastest way to make these rows, and to turn them."""
    if rows.shape[-1] % group_size:
        return False
    return automatic(rows.flat(), tuple(turns), group_size=group_size)[0] == "mosaic"


def _plain(run: Any, rows: Source, turns: tuple[Turn, ...], group_size: int, *, inverse: bool) -> tuple[Array, ...]:
    first: tuple[Array, ...] = ()
    if isinstance(rows, Normed):
        total = rows.total()
        first, rows = (total,), rms_norm(total, rows.weight, rows.epsilon)
    elif isinstance(rows, Gated):
        rows = rows.rows()
    x, precise = rows, jnp.promote_types(rows.dtype, jnp.float32)

    def turned(turn: Turn) -> Array:
        theta, pairs, scales = turn[:3]
        if turn.layer is not None:
            pick = lambda part: jax.lax.dynamic_index_in_dim(part, turn.layer, keepdims=False)  # noqa: E731
            theta, pairs, scales = jax.tree.map(pick, (theta, pairs, scales))
        result = x.astype(precise)
        if scales is not None:
            result = result * scales.astype(precise)
        if pairs is not None:
            result = run(result, theta.astype(precise), pairs, group_size, inverse=inverse)
        return result.astype(x.dtype)

    return first + tuple(turned(turn) for turn in turns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _on_hopper(x: Source, turns: tuple[Turn, ...], group_size: int) -> tuple[Array, ...]:
    """The kernel's results; its derivatives are XLA's."""
    stacks = tuple(turn if turn.layer is not None else _stack_of_one(turn) for turn in turns)

    def of_arrays(x: Source, turns: tuple[Turn, ...]) -> tuple[Array, ...]:
        given = {name: made(array) for name, array in operands(x).items()}
        weight = {name: given.pop(name) for name in ("weight",) if name in given}

        def turned(rows: dict[str, Array], rest: tuple[dict[str, Array], tuple[Turn, ...]]) -> tuple[Array, ...]:
            weight, turns = rest
            return _turned(with_operands(x, rows | weight), turns, group_size)

        return partitioning.over_rows(turned, given, (weight, turns))

    if any(isinstance(array, Partial) for array in operands(x).values()):
        return unless_mapped(functools.partial(mosaic_sm90.run, group_size=group_size), of_arrays)(x, stacks)
    return of_arrays(x, stacks)


def _turned(x: Source, turns: tuple[Turn, ...], group_size: int) -> tuple[Array, ...]:
    """What `mosaic_sm90.run` gives; on a mesh of automatic axes each device turns its rows and groups of channels.

    Of `Normed` rows it turns whole ones, since the norm is over all channels: these are gathered. So are channels that
    are cut through a group.
    """
    of_source: dict[str, Any] = operands(x)
    whole = f"{partitioning.ROWS} (groups channels)"
    axes = {name: "(groups channels)" if name == "weight" else whole for name in of_source}

    def run(**arrays: Array) -> tuple[Array, ...]:
        own = tuple(Turn(*(arrays.get(f"{field}{n}") for field in Turn._fields)) for n in range(len(turns)))
        return mosaic_sm90.run(with_operands(x, {name: arrays[name] for name in of_source}), own, group_size=group_size)

    of_turns: dict[str, Any] = {}
    for n, turn in enumerate(turns):
        of_turn = {
            "theta": f"layers{n} steps{n} (groups angles)",
            "pairs": f"layers{n} steps{n} (groups channels)",
            "channel_scales": f"layers{n} (groups channels)",
            "layer": "",
        }
        axes |= {f"{field}{n}": names for field, names in of_turn.items()}
        of_turns |= {f"{field}{n}": getattr(turn, field) for field in of_turn}
    is_normed = isinstance(x, Normed)
    results = [*(("sum",) if is_normed else ()), *(f"result{n}" for n in range(len(turns)))]
    return partitioning.cut(
        run,
        of_source | of_turns,
        axes=axes | dict.fromkeys(results, whole),
        results=results,
        along=(partitioning.ROWS, *(() if is_normed else ("groups",))),
        units={"channels": group_size, "angles": group_size // 2},
    )


def _on_hopper_fwd(x: Source, turns: tuple[Turn, ...], group_size: int) -> tuple[Any, Any]:
    return _on_hopper(x, turns, group_size), (x, turns)


def _on_hopper_bwd(group_size: int, residuals: Any, cotangents: tuple[Array, ...]) -> Any:
    def plain(x, turns):
        return _plain(xla.run, x, turns, group_size, inverse=False)

    return jax.vjp(plain, *residuals)[1](cotangents)


_on_hopper.defvjp(_on_hopper_fwd, _on_hopper_bwd)


def _stack_of_one(turn: Turn) -> Turn:
    return jax.tree.map(lambda part: part[None], turn)._replace(layer=jnp.int32(0))
