"""Tensors of one quantized linear in a checkpoint, checked as they are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxmodels.checkpoints.huggingface import Checkpoint
from pallas_kernels.quantized_matmul import QuantizedTensor


@dataclass(frozen=True)
class Linear:
    """The tensors `NAME.suffix` of one linear of O outputs and I inputs.

    Attributes:
      source: the checkpoint.
      name: of the module, such as "model.layers.0.self_attn.q_proj".
      outputs, inputs: O and I, from the model's configuration.
      room: where repacked codes go; None: a new array.
      joint: between name and suffix.
    """

    source: Checkpoint
    name: str
    outputs: int
    inputs: int
    room: np.ndarray | None = None
    joint: str = "."

    def has(self, suffix: str) -> bool:
        return self.tensor(suffix) in self.source.names()

    def tensor(self, suffix: str) -> str:
        """The name of one tensor."""
        return f"{self.name}{self.joint}{suffix}"

    def view(self, suffix: str, dtypes: Sequence[Any], *shapes: tuple[int, ...], finite: bool = False) -> np.ndarray:
        """A view of one tensor, which must have one of the dtypes and shapes, and with `finite` no NaN or infinity."""
        name = self.tensor(suffix)
        if name not in self.source.names():
            raise ValueError(f"checkpoint {self.source}: lacks {name}")
        dtype, shape, _ = self.source.describe(name)
        wanted = [np.dtype(dtype) for dtype in dtypes]
        if dtype not in wanted:
            raise self.error(suffix, f"has dtype {dtype}; expected {' or '.join(str(d) for d in wanted)}")
        if shape not in shapes:
            expected = " or ".join(str(s) for s in dict.fromkeys(shapes))
            raise self.error(suffix, f"has shape {shape}; the linear has {self.outputs} outputs, {self.inputs} inputs "
                                     f"and so needs {expected}")  # fmt: skip
        view = self.source.view(name)
        if finite and not np.isfinite(view.astype(np.float32)).all():
            raise self.error(suffix, "holds values that are not finite")
        self.source.count(view.nbytes)
        return view

    def error(self, suffix: str, problem: str) -> ValueError:
        name = self.tensor(suffix)
        return ValueError(f"{self.source.describe(name)[2]}: tensor {name!r} {problem}")


@runtime_checkable
class Scheme(Protocol):
    """How one family of checkpoints stores a quantized linear."""

    @property
    def marker(self) -> str:
        """The suffix of the tensor that only quantized linears have."""
        ...

    @property
    def title(self) -> str:
        """For people, such as "AWQ, 4 bits, groups of 128"."""
        ...

    def suffixes(self, name: str) -> tuple[set[str], set[str]]:
        """Tensors that the linear `name` must have, and those that it may have."""
        ...

    def read(self, linear: Linear) -> QuantizedTensor:
        """The weight `[O, I]` in NumPy arrays."""
        ...


def fields_of(block: Mapping[str, Any], known: Mapping[str, tuple[Any, ...] | None], where: str) -> dict[str, Any]:
    """The fields of a quantization config, all of them known; ValueError naming one that is not, or its value.

    `known` maps each field to the values that are implemented, the default first, or to None for any.
    """
    unknown = sorted(set(block) - set(known))
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0]!r} = {block[unknown[0]]!r}; it may change the weights")
    result = {}
    for field, allowed in known.items():
        value = block.get(field, allowed[0] if allowed else None)
        if allowed is not None and value not in allowed:
            raise ValueError(f"{where}: field {field!r} is {value!r}; implemented: {', '.join(map(repr, allowed))}")
        result[field] = value
    return result


def group_size_of(block: Mapping[str, Any], where: str) -> int:
    """The field "group_size", -1 or positive."""
    size = block.get("group_size")
    if type(size) is not int or (size < 1 and size != -1):
        raise ValueError(f"{where}: field 'group_size' must be -1 or a positive integer; got {size!r}")
    return size


def groups_of(linear: Linear, group_size: int) -> int:
    """G; ValueError naming the linear whose inputs the groups do not divide."""
    size = linear.inputs if group_size == -1 else group_size
    if linear.inputs % size:
        raise ValueError(f"{linear.name}: group_size {size} does not divide its {linear.inputs} inputs")
    return linear.inputs // size
