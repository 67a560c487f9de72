"""`QuantizedTensor`: a weight in few bits, whatever the format, and what it stands for.

Letters: O outputs, I inputs (the contracted channels), g inputs of a group, G = I / g, R steps of rotation, L layers.
"""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.quantized_matmul import nibbles
from pallas_kernels.quantized_matmul.order import MAX_WIDTH, input_order
from pallas_kernels.rotation import Turn, pairwise_rotation

Format = Literal["int4", "int8", "fp8", "nvfp4"]
Activations = Literal["int8", "fp8"]
CODES = {"int4": jnp.uint8, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn, "nvfp4": jnp.uint8}
"""What codes are stored in. Four-bit codes lie two to a byte, the even input in the low bits."""
SCALES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn)


class Rotation(NamedTuple):
    """The arguments of `pairwise_rotation`."""

    theta: Any  # floating [R, I / 2]
    pairs: Any  # integer [R, I]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A weight `[*outputs, *inputs]` as codes, scales, and what happens to activations before they meet them.

    The matrix of codes stands for `W[o, i] = (codes[o, i] - zeros[k, o]) * scales[k, o] * global_scale`, k the group of
    input i. Its product with activations x is that of `turn_all`: x times `input_scales`, rotated, and in the `order`
    of the codes' inputs. With every leaf stacked along a first axis L, and `layer` its index, it is one layer's weight;
    the stack itself has no `layer` and is what scans and slices take apart. Weights of a layer's experts have a second
    axis E in every leaf, or a first one when the layer's are taken apart, and `of_expert` is what products take; only
    scales and rotation of inputs may be one for all experts (`shares_turn`).

    Attributes:
      codes: `[O, I]` in `int8` or `float8_e4m3fn`, `[O, I / 2]` in uint8 for 4 bits: signed integers ("int4"), or
        E2M1 floats ("nvfp4").
      scales: `[G, O]`; G = 1 is one scale per output. "nvfp4" has float8_e4m3fn for every 16 inputs.
      zeros: int8 `[G, O]`, code that stands for 0; None: 0 ("int4" only).
      global_scale: float32 `[]`; None: 1.
      input_scales: `[I]`, multiply the activations first; None: 1.
      rotation: of the activations, in groups of I / G channels; None: none.
      order: int32 `[I]`; input i of the codes is input `order[i]` of the activations; None: the same.
      activation_scale: float32 `[]`, fixed scale of quantized activations; None: the largest of each token.
      layer: int32 `[]`.
      format: what `codes` are.
      shape: of the weight in the model, outputs and then inputs.
      num_inputs: trailing axes of `shape` that are contracted.
      activations: what activations are rounded to before the product; None: they are not.
      interleaved: whether the codes of each `width` inputs have changed places for the Hopper kernels: at place
        `input_order(width, bits)[i]` is that of input i. See `interleave`.
    """

    codes: Any
    scales: Any
    zeros: Any = None
    global_scale: Any = None
    input_scales: Any = None
    rotation: Rotation | None = None
    order: Any = None
    activation_scale: Any = None
    layer: Any = None
    format: Format = dataclasses.field(default="int4", metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    num_inputs: int = dataclasses.field(default=1, metadata={"static": True})
    activations: Activations | None = dataclasses.field(default=None, metadata={"static": True})
    interleaved: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def inputs(self) -> int:
        """I."""
        return math.prod(self.shape[len(self.shape) - self.num_inputs :])

    @property
    def outputs(self) -> int:
        """O."""
        return math.prod(self.shape[: len(self.shape) - self.num_inputs])

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.inputs // self.scales.shape[-2]

    @property
    def width(self) -> int:
        """Inputs whose codes change places among each other, if they do: those of one group, if groups have scales."""
        return min(self.group_size, MAX_WIDTH) if self.scales.shape[-2] > 1 else MAX_WIDTH

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Of all its arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def __getitem__(self, index: Any) -> "QuantizedTensor":
        """`tensor[...]`, which is how a module reads any of its weights."""
        if index is not Ellipsis:
            raise TypeError(f"a QuantizedTensor has no parts; got the index {index!r}")
        return self

    def of_layer(self, layer: int | Array) -> "QuantizedTensor":
        """One layer's weight of a stack; copies nothing."""
        return dataclasses.replace(self, layer=jnp.asarray(layer, jnp.int32))

    def of_expert(self, expert: int | Array) -> "QuantizedTensor":
        """One expert's weight of a stack of experts, or of one of layers and their experts; copies nothing.

        Without what the experts share: activations must have been turned already.
        """
        if self.shares_turn:
            return dataclasses.replace(self, input_scales=None, rotation=None).of_expert(expert)
        if self.layer is None:
            return self.of_layer(expert)
        every = dataclasses.replace(self, layer=None)
        every = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), every)
        return every.of_layer(self.layer * self.codes.shape[1] + jnp.asarray(expert, jnp.int32))

    @property
    def shares_turn(self) -> bool:
        """Whether `input_scales` and `rotation` lack the axis of experts that codes have: all experts share them."""
        if self.rotation is not None:
            return self.rotation.theta.ndim < self.codes.ndim
        return self.input_scales is not None and self.input_scales.ndim + 1 < self.codes.ndim

    def sliced(self) -> "QuantizedTensor":
        """The weight with leaves of its own; one of a stack is cut out."""
        return self if self.layer is None else self.own(dataclasses.replace(self, layer=None))

    def own(self, stacked: Any) -> Any:
        """This layer's part of some leaves."""
        if self.layer is None:
            return stacked
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, self.layer, keepdims=False), stacked)

    @property
    def rotates(self) -> bool:
        """Whether it scales or rotates activations."""
        return self.rotation is not None or self.input_scales is not None

    def as_turn(self) -> Turn:
        """The rotation, if any, with scales of inputs and the index of the layer."""
        theta, pairs = self.rotation or (None, None)
        return Turn(theta, pairs, self.input_scales, self.layer)

    def check(self, name: str = "weight") -> None:
        """Raises ValueError, naming the part, when shapes, dtypes and fields do not fit together."""
        if self.format not in CODES:
            raise ValueError(f"{name}: format must be one of {[*CODES]}; got {self.format!r}")
        if self.activations not in (None, *get_args(Activations)):
            raise ValueError(f"{name}: activations must be None, 'int8' or 'fp8'; got {self.activations!r}")
        if self.activations is not None and self.activations != self.format:
            raise ValueError(f"{name}: {self.activations} activations need {self.activations} codes; got {self.format}")
        if not 0 < self.num_inputs < len(self.shape) or min(self.shape) < 1:
            raise ValueError(f"{name}: shape {self.shape} must have outputs and {self.num_inputs} axes of inputs")
        stack = () if self.layer is None else self.codes.shape[:1]
        packed = self.inputs // 2 if self.format in ("int4", "nvfp4") else self.inputs
        if self.format in ("int4", "nvfp4") and self.inputs % 2:
            raise ValueError(f"{name}: four-bit codes need an even number of inputs; got {self.inputs}")
        groups = self.scales.shape[-2] if self.scales.ndim > 1 else 0
        if not groups or self.inputs % groups:
            raise ValueError(f"{name}: scales {self.scales.shape} must be [G, O], G a divisor of {self.inputs} inputs")
        if self.format == "nvfp4" and self.group_size != 16:
            raise ValueError(f"{name}: NVFP4 has groups of 16; got {self.group_size}")
        if self.activations is not None and groups != 1:
            raise ValueError(f"{name}: quantized activations need one scale per output; got {groups} groups")
        if self.zeros is not None and self.format != "int4":
            raise ValueError(f"{name}: only int4 codes have zeros; got {self.format}")
        if self.interleaved and (reason := _why_not_interleaved(self)) is not None:
            raise ValueError(f"{name}: cannot be interleaved: {reason}")
        grid = (groups, self.outputs)
        parts = [
            ("codes", self.codes, (self.outputs, packed), (CODES[self.format],)),
            ("scales", self.scales, grid, SCALES),
            ("zeros", self.zeros, grid, (jnp.int8,)),
            ("global_scale", self.global_scale, (), (jnp.float32,)),
            ("input_scales", self.input_scales, (self.inputs,), SCALES[:3]),
            ("order", self.order, (self.inputs,), (jnp.int32,)),
            ("activation_scale", self.activation_scale, (), (jnp.float32,)),
        ]
        if self.rotation is not None:
            steps = self.rotation.theta.shape[-2]
            parts.append(("rotation.theta", self.rotation.theta, (steps, self.inputs // 2), SCALES[:3]))
            parts.append(("rotation.pairs", self.rotation.pairs, (steps, self.inputs), (jnp.int16, jnp.int32)))
        for part, array, shape, dtypes in parts:
            if array is not None and (tuple(array.shape) != stack + shape or array.dtype not in dtypes):
                wanted = " or ".join(jnp.dtype(dtype).name for dtype in dtypes)
                raise ValueError(
                    f"{name}: {part} must be {wanted} of shape {stack + shape}; got {array.dtype} {tuple(array.shape)}"
                )


def interleave(weight: QuantizedTensor) -> QuantizedTensor:
    """The weight with its codes where the Hopper kernels want them, so that no activation is put into their order.

    XLA's products then have to bring them back, so it is worth it where kernels multiply. A weight or a stack of them
    for which there is no such order (NVFP4, rounded activations, inputs that are no multiple of `width`) stays as it
    is. The new codes lie on devices as the old ones do.
    """
    if weight.interleaved or not can_interleave(weight):
        return weight
    codes = _interleaved(weight.codes, width=weight.width, bits=_bits(weight))
    if not isinstance(codes, jax.core.Tracer):
        codes = jax.device_put(codes, weight.codes.sharding)
    return dataclasses.replace(weight, codes=codes, interleaved=True)


def can_interleave(weight: QuantizedTensor) -> bool:
    return _why_not_interleaved(weight) is None


@functools.partial(jax.jit, static_argnames=("width", "bits"))  # unpacked codes are never made
def _interleaved(codes: Array, *, width: int, bits: int) -> Array:
    each = nibbles.unpack(codes) if bits == 4 else codes
    each = each.reshape(*each.shape[:-1], -1, width)[..., np.argsort(input_order(width, bits))].reshape(each.shape)
    return jnp.asarray(nibbles.pack(each)) if bits == 4 else each


def _why_not_interleaved(weight: QuantizedTensor) -> str | None:
    if weight.format == "nvfp4":
        return "codes of NVFP4 stay with the scales of their blocks"
    if weight.activations is not None:
        return "eight-bit products of XLA take codes as they are"
    size = weight.inputs if weight.scales.shape[-2] == 1 else weight.group_size
    if size % weight.width or weight.width not in (32, 64, MAX_WIDTH):
        return f"{weight.inputs} inputs in groups of {size} are not multiplied in parts of 32, 64 or {MAX_WIDTH}"
    return None


def _bits(weight: QuantizedTensor) -> int:
    """Of a code."""
    return 4 if CODES[weight.format] == jnp.uint8 else 8


def matrix(weight: QuantizedTensor, dtype: Any = jnp.float32) -> Float[Array, "O I"]:
    """What the codes stand for, without rotation, order and scales of inputs; computed in float32."""
    weight = weight.sliced()
    if weight.format == "int4":
        values = nibbles.signed(weight.codes)
    elif weight.format == "nvfp4":
        values = nibbles.e2m1(weight.codes)
    else:
        values = weight.codes
    groups, outputs = weight.scales.shape
    if weight.interleaved:
        order = jnp.asarray(input_order(weight.width, _bits(weight)))
        values = values.reshape(outputs, -1, weight.width)[..., order]
    values = values.astype(jnp.float32).reshape(outputs, groups, -1)
    if weight.zeros is not None:
        values = values - weight.zeros.astype(jnp.float32).T[..., None]
    scales = weight.scales.astype(jnp.float32)
    if weight.global_scale is not None:
        scales = scales * weight.global_scale
    return (values * scales.T[..., None]).reshape(outputs, -1).astype(dtype)


def dequantize(weight: QuantizedTensor) -> Float[Array, "..."]:
    """The dense float32 weight, of the model's shape, whose product with activations is the quantized one's.

    Rounding of activations apart, which a dense weight cannot have.
    """
    weight.check()
    weight = weight.sliced()
    dense = matrix(weight)
    if weight.order is not None:
        dense = jnp.zeros_like(dense).at[:, weight.order].set(dense)
    if weight.rotation is not None:
        dense = pairwise_rotation(dense, *weight.rotation, group_size=weight.group_size, inverse=True)
    if weight.input_scales is not None:
        dense = dense * weight.input_scales.astype(jnp.float32)
    return dense.reshape(weight.shape)
