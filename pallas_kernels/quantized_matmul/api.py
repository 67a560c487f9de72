"""`quantized_matmul` and `quantized_matmuls`: argument checks and the choice of implementation."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch, partitioning
from pallas_kernels.partial import MaybePartial, Partial, unless_mapped
from pallas_kernels.quantized_matmul import mosaic_sm90, reference, rounding, xla
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor, can_interleave
from pallas_kernels.quantized_matmul.turned import Rows, Turned, turn_all

NAMES = ("mosaic", "xla", "reference")
MANY_OUTPUTS = 2**14  # with few, such as those of keys alone, the kernel may be slower than XLA


def quantized_matmul(
    x: Float[Array, "*rows I"],
    weight: QuantizedTensor,
    *,
    dtype: Any = None,
    implementation: str | None = None,
) -> Float[Array, "*rows O"]:
    """`x @ dequantize(weight).T`, without the dense weight in memory for long.

    Activations are scaled, rotated and ordered as the weight asks (in float32, then rounded to bfloat16 if `x` is
    that), rounded to eight bits if it asks for that too, and multiplied with the codes; sums are float32 (int32 of int8
    codes) and rounded once. Differentiable in `x` and in the floating parts of the weight, but for rounded activations.

    Args:
      x: activations `[*rows, I]`; float32, bfloat16 or float16.
      weight: see there.
      dtype: type of the result; None is that of `x`.
      implementation: "mosaic", "xla" or "reference"; None is the automatic choice (`automatic`). "mosaic", the Hopper
        kernel, takes all codes and bfloat16 activations (any, where they are rounded), and reads the weight of a stack
        in place; its gradients are those of "xla". On a mesh of automatic axes each device multiplies its rows and its
        outputs, or its groups of inputs, whose sums are added up in float32 before they are rounded; what is cut
        through a group or a unit of the kernel is gathered along that axis (README). Explicit axes it does not take.

    Raises:
      ValueError: arguments that do not fit together.
      NotImplementedError: "mosaic" cannot run this call, and why.
    """
    (result,) = quantized_matmuls(x, (weight,), dtype=dtype, implementation=implementation)
    return result


def quantized_matmuls(
    x: Rows,
    weights: Sequence[QuantizedTensor],
    *,
    dtype: Any = None,
    implementation: str | None = None,
    merged: bool = True,
) -> tuple[MaybePartial, ...]:
    """`quantized_matmul` of the same activations with each of the weights.

    They are rotated for all in one launch, and the Hopper kernel multiplies up to 64 rows with all weights of a kind in
    one: the automatic choice is then made for all of these, by the sum of their outputs.

    Not `merged`, a result may be `Partial`: in the parts that the kernel has of it, for a reader that adds them up.
    Activations that are `Turned` for these weights stay as they are.
    """
    if implementation not in (None, *NAMES):
        raise ValueError(f"implementation must be None or one of {[*NAMES]}; got {implementation!r}")
    for weight in weights:
        if not isinstance(weight, QuantizedTensor):
            raise ValueError(f"weight must be a QuantizedTensor; got {type(weight).__name__}")
        weight.check()
        if x.ndim < 1 or x.shape[-1] != weight.inputs or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"x must be floating and end with {weight.inputs} inputs; got {x.dtype} of shape {x.shape}"
            )
    if isinstance(x, Turned) and len(x.each) != len(weights):
        raise ValueError(f"x was turned for {len(x.each)} weights; got {len(weights)}")
    dtype = jnp.dtype(dtype or x.dtype)
    rows = x.reshape((math.prod(x.shape[:-1]), x.shape[-1]))
    products: dict[int, Array] = {}
    launches = [_Launch.of(members, rows, weights, dtype, implementation) for members in _together(rows, weights)]
    turned = rows.each if isinstance(rows, Turned) else turn_all(rows, weights)
    for launch in launches:
        chosen = tuple(turned[i] for i in launch.members), tuple(weights[i] for i in launch.members)
        products |= zip(launch.members, launch.products(*chosen, dtype, merged), strict=True)
    return tuple(products[i].reshape((*x.shape[:-1], weight.outputs)) for i, weight in enumerate(weights))


def is_better_interleaved(weight: QuantizedTensor, dtype: Any) -> bool:
    """Whether products of few tokens in this dtype with a weight, or with those of a stack, are faster then.

    So they are where a Hopper kernel is then the automatic choice.
    """
    if weight.interleaved or not can_interleave(weight):
        return False
    one = weight
    for _ in range(weight.codes.ndim - 2):  # of layers, experts
        one = one.of_expert(0)
    token = jax.ShapeDtypeStruct((1, weight.inputs), dtype)
    return automatic(token, dataclasses.replace(one, interleaved=True), dtype=dtype)[0] == "mosaic"


def _together(x: Rows, weights: Sequence[QuantizedTensor]) -> list[list[int]]:
    """Which products a kernel can make together, by their numbers."""
    together: dict[Any, list[int]] = {}
    for i, weight in enumerate(weights):
        is_alone = x.shape[0] > mosaic_sm90.MAX_ROWS_TOGETHER or hopper_unsupported(x, weight) is not None
        others = (weight.zeros is None, weight.global_scale is None, weight.activations, weight.interleaved)
        kind = weight.format, _groups(weight), weight.scales.dtype, *others
        together.setdefault(i if is_alone else kind, []).append(i)
    return [*together.values()]


class _Launch(NamedTuple):
    """Products of some of the weights, and what makes them."""

    members: list[int]
    implementation: str

    @classmethod
    def of(
        cls, members: list[int], x: Rows, weights: Sequence[QuantizedTensor], dtype: Any, implementation: str | None
    ) -> "_Launch":
        first = weights[members[0]]
        if implementation is None:
            outputs = sum(weights[i].outputs for i in members)
            implementation, _ = automatic(x, first, dtype=dtype, outputs=outputs)
        elif implementation == "mosaic" and (reason := hopper_unsupported(x, first)) is not None:
            raise NotImplementedError(f'quantized_matmul "mosaic": {reason}')
        return cls(members, implementation)

    def products(
        self, turned: tuple[Array, ...], weights: tuple[QuantizedTensor, ...], dtype: Any, merged: bool
    ) -> tuple[MaybePartial, ...]:
        """`[M, O]` each."""
        results: tuple[MaybePartial, ...]
        if self.implementation == "mosaic":
            merged = merged or weights[0].activations is not None or partitioning.is_automatic()
            results = _on_hopper(turned, weights, _kernel_result(weights[0], dtype), merged)
        else:
            run = reference.run if self.implementation == "reference" else xla.run
            results = tuple(run(x, weight.sliced()) for x, weight in zip(turned, weights, strict=True))
        return tuple(
            dataclasses.replace(result, dtype=dtype) if isinstance(result, Partial) else result.astype(dtype)
            for result in results
        )


def automatic(x: Rows, weight: QuantizedTensor, *, dtype: Any, outputs: int | None = None) -> tuple[str, str]:
    """The implementation that a call without a name takes, and why no other, in words.

    On a mesh it is chosen by the sizes of the whole call, and the kernel's tiles by those of each device's part.

    Args:
      x: activations `[M, I]`, already turned.
      weight: of the call.
      dtype: of the result.
      outputs: of all weights that are multiplied together; None: of this one.
    """
    if x.shape[0] == 0:
        return "xla", "nothing to do"
    if (reason := dispatch.undivided(is_cut=True)) is not None:
        return "xla", f"mosaic: {reason}"
    kind = dispatch.ProductKind(
        codes=weight.format,
        group_size=_groups(weight),
        zeros=weight.zeros is not None,
        scales=str(weight.scales.dtype),
        result=str(_kernel_result(weight, dtype)),
        activations=weight.activations or "",
    )
    outputs = outputs or weight.outputs
    if weight.interleaved:  # XLA would have to bring the codes back, which it had not in any call that was timed
        outputs = max(outputs, MANY_OUTPUTS)
    sizes = {"rows": x.shape[0], "outputs": outputs, "inputs": weight.inputs}
    (first, *_), reason = dispatch.preferred("quantized_matmul", kind, sizes, gradients=False)
    if first == "mosaic" and (why_not := hopper_unsupported(x, weight)) is not None:
        return "xla", f"mosaic: {why_not}"
    return first, reason


def hopper_unsupported(x: Any, weight: QuantizedTensor) -> str | None:
    """Why the Hopper kernel cannot multiply these activations `[M, I]`, already turned; None when it can."""
    if (reason := dispatch.undivided(is_cut=True)) is not None:
        return reason
    if weight.activations is not None:  # their codes are what the kernel gets
        x = jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
    return mosaic_sm90.unsupported(x, **_stack(weight), **_options(weight))


def _kernel_result(weight: QuantizedTensor, dtype: Any) -> Any:
    """What the kernel is asked for, which rounds to bfloat16 itself if no scales of tokens are to follow."""
    is_last = dtype == jnp.bfloat16 and weight.activations is None
    return jnp.dtype(jnp.bfloat16 if is_last else jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _on_hopper(
    turned: tuple[Array, ...], weights: tuple[QuantizedTensor, ...], dtype: Any, merged: bool
) -> tuple[MaybePartial, ...]:
    """The kernel's products `[M, O]`; their derivatives are XLA's.

    Codes of rounded activations are bfloat16 numbers, so their products are those of eight bits, summed in float32.
    """

    scales: list[Any] = [None] * len(weights)
    if weights[0].activations is not None:
        rounded = [
            rounding.activations(x, weights[0].activations, weight.own(weight.activation_scale))
            for x, weight in zip(turned, weights, strict=True)
        ]
        turned, scales = tuple(codes.astype(jnp.bfloat16) for codes, _ in rounded), [scale for _, scale in rounded]
    options = _options(weights[0]) | {"interleaved": weights[0].interleaved}
    stacks = tuple(_stack(weight) for weight in weights)
    if not merged:
        return _partial_products(turned, stacks, **options, dtype=dtype)
    results = partitioning.over_rows(functools.partial(_products, **options, dtype=dtype), turned, stacks)
    return tuple(x if scale is None else x * scale for x, scale in zip(results, scales, strict=True))


def _partial_products(
    turned: tuple[Array, ...], stacks: tuple[dict[str, Any], ...], *, dtype: Any, **options: Any
) -> tuple[MaybePartial, ...]:
    """`_products` that may be left in parts, on one device. Under `jax.vmap` the first part is all."""

    def in_parts(turned: tuple[Array, ...], stacks: tuple[dict[str, Any], ...]) -> tuple[MaybePartial, ...]:
        of_weights = [mosaic_sm90.Operands(x, **stack) for x, stack in zip(turned, stacks, strict=True)]
        return mosaic_sm90.run_together(of_weights, **options, dtype=dtype, merged=False)

    def in_one(turned: tuple[Array, ...], stacks: tuple[dict[str, Any], ...]) -> tuple[MaybePartial, ...]:
        whole = partitioning.over_rows(functools.partial(_products, **options, dtype=jnp.float32), turned, stacks)

        def as_part(like: MaybePartial, result: Array) -> MaybePartial:
            if not isinstance(like, Partial):
                return result.astype(like.dtype)
            rows, columns = slice(like.rows), slice(like.first, like.first + like.width)
            parts = jnp.zeros(like.parts.shape, like.parts.dtype).at[0, rows, columns].set(result)
            return dataclasses.replace(like, parts=parts)

        likes = jax.eval_shape(in_parts, turned, stacks)
        return tuple(as_part(like, result) for like, result in zip(likes, whole, strict=True))

    return unless_mapped(in_parts, in_one)(turned, stacks)


def _products(
    turned: tuple[Array, ...],
    stacks: tuple[dict[str, Any], ...],
    *,
    group_size: int,
    format: str,
    dtype: Any,
    interleaved: bool,
) -> tuple[Array, ...]:
    """What `mosaic_sm90.run_together` gives; on a mesh of automatic axes each device multiplies its part.

    Cut are rows, the outputs of each weight in units of `mosaic_sm90.OUTPUTS`, and inputs in units of
    `mosaic_sm90.unit_of_inputs`, alike for all weights: the parts' float32 results are added up and then rounded.
    Where weights and activations lie differently, it is as the first weight's codes do.
    """
    inputs, groups = turned[0].shape[1], stacks[0]["scales"].shape[1]
    unit = mosaic_sm90.unit_of_inputs(inputs, groups, format, interleaved=interleaved)
    units = {
        "outputs": mosaic_sm90.OUTPUTS,
        "inputs": unit,
        "codes": stacks[0]["codes"].shape[2] * unit // inputs,
        "groups": max(groups * unit // inputs, 1),
    }
    operands: dict[str, Any] = {}
    axes: dict[str, str] = {}
    for n, (x, stack) in enumerate(zip(turned, stacks, strict=True)):
        grid = f"layers{n} {'one' if groups == 1 else '(i groups)'} (o{n} outputs)"
        of_weight = {
            "codes": f"layers{n} (o{n} outputs) (i codes)",
            "scales": grid,
            "zeros": grid,
            "global_scale": f"layers{n}",
            "layer": "",
            "x": f"{partitioning.ROWS} (i inputs)",
        }
        axes |= {f"{name}{n}": names for name, names in of_weight.items()}
        axes[f"result{n}"] = f"{partitioning.ROWS} (o{n} outputs)"
        operands |= {f"{name}{n}": (stack | {"x": x})[name] for name in of_weight}

    def run(dtype: Any, **arrays: Array) -> tuple[Any, ...]:
        fields = mosaic_sm90.Operands._fields
        of_weights = [
            mosaic_sm90.Operands(*(arrays.get(f"{field}{n}") for field in fields)) for n in range(len(stacks))
        ]
        options: dict[str, Any] = {"group_size": group_size, "format": format, "interleaved": interleaved}
        return mosaic_sm90.run_together(of_weights, **options, dtype=dtype)

    return partitioning.cut(
        functools.partial(run, dtype),
        operands,
        axes=axes,
        results=[f"result{n}" for n in range(len(stacks))],
        along=(partitioning.ROWS, *(f"o{n}" for n in range(len(stacks))), "i"),
        units=units,
        summed=partitioning.Summed("i", functools.partial(run, jnp.float32)),
    )


def _on_hopper_fwd(turned: Any, weights: Any, dtype: Any, merged: bool) -> tuple[tuple[MaybePartial, ...], Any]:
    return _on_hopper(turned, weights, dtype, merged), (turned, weights)


def _on_hopper_bwd(dtype: Any, merged: bool, residuals: Any, cotangents: tuple[MaybePartial, ...]) -> Any:
    del dtype, merged

    def products(turned, weights):
        return tuple(xla.run(x, weight.sliced()) for x, weight in zip(turned, weights, strict=True))

    def whole(cotangent: MaybePartial) -> Array:
        """Parts are only ever added up, so each has the cotangent of the sum."""
        if isinstance(cotangent, Partial):
            return cotangent.own[0]
        return cotangent.astype(jnp.float32)

    return jax.vjp(products, *residuals)[1](tuple(map(whole, cotangents)))


_on_hopper.defvjp(_on_hopper_fwd, _on_hopper_bwd)


def _stack(weight: QuantizedTensor) -> dict[str, Any]:
    """The kernel's arrays by name, with an axis of layers, and the index of the layer."""
    parts = {name: getattr(weight, name) for name in ("codes", "scales", "zeros", "global_scale")}
    if weight.layer is not None:
        return parts | {"layer": weight.layer}
    return {name: None if part is None else part[None] for name, part in parts.items()} | {"layer": jnp.int32(0)}


def _options(weight: QuantizedTensor) -> dict[str, Any]:
    return {"group_size": _groups(weight), "format": weight.format}


def _groups(weight: QuantizedTensor) -> int:
    return -1 if weight.scales.shape[-2] == 1 else weight.group_size
