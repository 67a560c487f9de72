"""`norm_rope`: argument checks and the choice of implementation."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch, partitioning
from pallas_kernels.norm_rope import mosaic_sm90, reference, xla
from pallas_kernels.partial import MaybePartial, Partial, made, unless_mapped

NAMES = ("mosaic", "xla", "reference")


def norm_rope(
    heads: Sequence[MaybePartial],
    weights: Sequence[Float[Array, " H"] | None],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
    *,
    epsilon: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T _ H"], ...]:
    """`apply_rope(rms_norm(x, weight, epsilon), cos, sin)` of each of the heads, such as queries and keys.

    Each head x of H channels becomes `x / sqrt(mean(x²) + epsilon) * weight`, and its pairs (i, i + H / 2) are rotated.
    Both steps compute in float32 and round to the dtype of x, the norm too, before the rotation; XLA may leave out that
    rounding between them where it fuses both. Differentiable in everything but epsilon.

    Args:
      heads: arrays `[B, T, N, H]` of one dtype, whose N may differ. `Partial` ones of as many parts the Hopper kernel
        adds up itself.
      weights: of the norm of each of the arrays. None: it stays as it is, as values do; of a `Partial` one that is the
        array.
      cos: cosines of the angles of the pairs.
      sin: sines.
      epsilon: of the norm.
      implementation: "mosaic", "xla" or "reference"; None is the automatic choice. The gradients of "mosaic", the
        Hopper kernel, are those of "xla". On a mesh of automatic axes each device has its rows and heads.

    Raises:
      ValueError: arguments that do not fit together.
      NotImplementedError: "mosaic" cannot run this call, and why.
    """
    if implementation not in (None, *NAMES):
        raise ValueError(f"implementation must be None or one of {[*NAMES]}; got {implementation!r}")
    heads, weights = tuple(heads), tuple(weights)
    _check(heads, weights, cos, sin)
    if not _are_alike(heads) or partitioning.is_automatic():
        heads = tuple(map(made, heads))
    chosen = [i for i, weight in enumerate(weights) if weight is not None or isinstance(heads[i], Partial)]
    if len(chosen) < len(heads):
        given = tuple(heads[i] for i in chosen), tuple(weights[i] for i in chosen)
        results = norm_rope(*given, cos, sin, epsilon=epsilon, implementation=implementation) if chosen else ()
        return _replaced(heads, chosen, results)
    if implementation is None:
        implementation, _ = automatic(heads, weights, cos, sin)
    elif implementation == "mosaic" and (
        reason := dispatch.undivided(is_cut=True) or mosaic_sm90.unsupported(heads, weights, cos, sin)
    ):
        raise NotImplementedError(f'norm_rope "mosaic": {reason}')
    if implementation == "mosaic":
        return _on_hopper(heads, weights, cos, sin, epsilon)
    run = reference.run if implementation == "reference" else xla.run
    return run(tuple(map(made, heads)), weights, cos, sin, epsilon)


def _replaced(arrays: Sequence[Array], places: Sequence[int], others: Sequence[Array]) -> tuple[Array, ...]:
    """The arrays with others in some places."""
    return tuple((dict(enumerate(arrays)) | dict(zip(places, others, strict=True))).values())


def _are_alike(heads: tuple[MaybePartial, ...]) -> bool:
    """Whether all are arrays, or all have parts that the kernel can add up alike."""
    parts = [x.parts.shape if isinstance(x, Partial) else None for x in heads]
    return len(set(parts)) == 1


def _check(heads: tuple[MaybePartial, ...], weights: tuple[Array | None, ...], cos: Array, sin: Array) -> None:
    if not heads or len(heads) != len(weights):
        raise ValueError(f"heads need a weight each, and there must be some; got {len(heads)} and {len(weights)}")
    first = heads[0]
    for x, weight in zip(heads, weights, strict=True):
        if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating) or x.shape[3] < 2 or x.shape[3] % 2:
            raise ValueError(f"heads must be floating [B, T, N, H] with an even H; got {x.dtype} of shape {x.shape}")
        if x.dtype != first.dtype or (*x.shape[:2], x.shape[3]) != (*first.shape[:2], first.shape[3]):
            raise ValueError(
                f"heads must agree in dtype, B, T and H; got {first.dtype} of shape {first.shape} and "
                f"{x.dtype} of shape {x.shape}"
            )
        if weight is not None and weight.shape != x.shape[3:]:
            raise ValueError(f"weights must have shape {x.shape[3:]}; got {weight.shape}")
    table = (*first.shape[:2], first.shape[3] // 2)
    if cos.shape != table or sin.shape != table:
        raise ValueError(f"cos and sin must have shape {table}; got {cos.shape} and {sin.shape}")


def automatic(heads: tuple[Any, ...], weights: tuple[Any, ...], cos: Any, sin: Any) -> tuple[str, str]:
    """The implementation that a call without a name takes, and why no other, in words."""
    rows, head_dim = heads[0].shape[0] * heads[0].shape[1], heads[0].shape[3]
    sizes = {"rows": rows, "heads": sum(x.shape[2] for x in heads)}
    if not all(sizes.values()):
        return "xla", "nothing to do"
    if (reason := dispatch.undivided(is_cut=True)) is not None:
        return "xla", f"mosaic: {reason}"
    dtype = next((weight.dtype for weight in weights if weight is not None), heads[0].dtype)
    kind = dispatch.NormRopeKind(head_dim, str(heads[0].dtype), str(dtype), isinstance(heads[0], Partial))
    (first, *_), reason = dispatch.preferred("norm_rope", kind, sizes, gradients=False)
    if first == "mosaic" and (why_not := mosaic_sm90.unsupported(heads, weights, cos, sin)) is not None:
        return "xla", f"mosaic: {why_not}"
    return first, reason


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _on_hopper(
    heads: tuple[MaybePartial, ...], weights: tuple[Array | None, ...], cos: Array, sin: Array, epsilon: float
) -> tuple[Array, ...]:
    """The kernel's results; its derivatives are XLA's."""
    flat = tuple(x.reshape((x.shape[0] * x.shape[1], *x.shape[2:])) for x in (*heads, cos, sin))

    def of_arrays(flat: tuple[MaybePartial, ...], weights: tuple[Array | None, ...]) -> tuple[Array, ...]:
        arrays = tuple(map(made, flat))
        has_norm = [i for i, weight in enumerate(weights) if weight is not None]
        given = tuple(arrays[i] for i in has_norm) + arrays[len(weights) :]
        own = tuple(weights[i] for i in has_norm)
        results = partitioning.over_rows(functools.partial(_of_rows, epsilon=epsilon), given, own)
        return _replaced(arrays[: len(weights)], has_norm, results)

    def of_parts(flat: tuple[MaybePartial, ...], weights: tuple[Array | None, ...]) -> tuple[Array, ...]:
        *heads, cos, sin = flat
        return mosaic_sm90.run(heads, weights, cos, sin, epsilon=epsilon)

    if isinstance(heads[0], Partial):
        results = unless_mapped(of_parts, of_arrays)(flat, weights)
    else:
        results = of_arrays(flat, weights)
    return tuple(result.reshape(x.shape) for result, x in zip(results, heads, strict=True))


def _of_rows(of_rows: tuple[Array, ...], weights: tuple[Array, ...], *, epsilon: float) -> tuple[Array, ...]:
    """What `mosaic_sm90.run` gives; on a mesh of automatic axes each device has its rows, and its heads of each array.

    Of an array whose heads are cut within a head, all heads are gathered.
    """
    *heads, cos, sin = of_rows
    names, rows = range(len(weights)), partitioning.ROWS

    def run(*, cos: Array, sin: Array, **arrays: Array) -> tuple[Array, ...]:
        own, of_own = (tuple(arrays[f"{kind}{n}"] for n in names) for kind in ("heads", "weight"))
        return mosaic_sm90.run(own, of_own, cos, sin, epsilon=epsilon)

    return partitioning.cut(
        run,
        {
            **{f"heads{n}": x for n, x in enumerate(heads)},
            **{f"weight{n}": weight for n, weight in enumerate(weights)},
            "cos": cos,
            "sin": sin,
        },
        axes={
            **{f"heads{n}": f"{rows} n{n} h" for n in names},
            **{f"weight{n}": "h" for n in names},
            **dict.fromkeys(("cos", "sin"), f"{rows} half"),
        },
        results=[f"heads{n}" for n in names],
        along=(rows, *(f"n{n}" for n in names)),
    )


def _on_hopper_fwd(heads: Any, weights: Any, cos: Array, sin: Array, epsilon: float) -> tuple[Any, Any]:
    return _on_hopper(heads, weights, cos, sin, epsilon), (heads, weights, cos, sin)


def _on_hopper_bwd(epsilon: float, residuals: Any, cotangents: tuple[Array, ...]) -> Any:
    def plain(heads, weights, cos, sin):
        return xla.run(tuple(map(made, heads)), weights, cos, sin, epsilon)

    return jax.vjp(plain, *residuals)[1](cotangents)


_on_hopper.defvjp(_on_hopper_fwd, _on_hopper_bwd)
