"""From the tensors of a checkpoint to the arrays of a model and back, driven by one visible table.

A `Row` says that a tensor of the checkpoint is a parameter of the model. Tensors of layers are stacked along
a first axis L, those of a layer's experts along a second one, E. Otherwise the two differ by splitting
dimensions only, so a device's part of a parameter is a slice of a view of the memory map, and nothing but
that slice is ever read.
"""

import itertools
import math
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Sharding

from jaxmodels.checkpoints.huggingface import Checkpoint
from jaxmodels.checkpoints.safetensors import LazyTensor

FLOATS = tuple(np.dtype(t) for t in (np.float32, ml_dtypes.bfloat16, np.float16))
ALIGNMENT = 64  # bytes; XLA's CPU client takes over such a NumPy buffer without copying it


@dataclass(frozen=True)
class OtherLayout:
    """A second layout that a tensor may be stored in; another number of dimensions tells it.

    Attributes:
      shape: its shape, from that of the first layout.
      read: a view of such a tensor in the first layout.
    """

    shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    read: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Row:
    """`key` of the checkpoint -> `path` in the parameters.

    Attributes:
      key: tensor name; the first "{}" is the layer, a second one the expert.
      path: keys of the nested parameter dict.
      dims: the checkpoint's dimensions in letters; "(N H) D" is a matrix whose rows are split into N and H.
      layers: which layers the checkpoint stores, the parameter being 0 in the others; None: all.
      other: another layout that is read too; None: there is none.
      experts: how many experts each layer stores; None: the parameter has no axis of experts.
      shared: what the names of tensors begin with that all experts of a layer share, if their storage has such; "{}" is
        the layer.
    """

    key: str
    path: tuple[str, ...]
    dims: str
    layers: tuple[int, ...] | None = None
    other: OtherLayout | None = None
    experts: int | None = None
    shared: str | None = None

    def __post_init__(self):
        if self.key.count("{}") < 2 and self.experts is not None:
            raise ValueError(f"{self.key!r} names no expert; got experts={self.experts}")

    @property
    def stacked(self) -> int:
        """First axes of the parameter that the checkpoint stores tensor by tensor: 0, 1 (layers) or 2 (experts)."""
        return self.key.count("{}")

    @property
    def axes(self) -> list[list[str]]:
        """The letters of each dimension in the checkpoint, without the stacked axes."""
        return [group.strip("()").split() for group in re.findall(r"\([^()]*\)|\w+", self.dims)]

    def name(self, *index: int) -> str:
        """The tensor at an index of the stacked axes."""
        return self.key.format(*index)

    def indices(self, layers: int) -> list[tuple[int, ...]]:
        """Of the tensors that a model of `layers` stores; one without numbers for a parameter that is not stacked."""
        if not self.stacked:
            return [()]
        stored = range(layers) if self.layers is None else self.layers
        experts = () if self.stacked == 1 else (range(self.experts or 0),)
        return [*itertools.product(stored, *experts)]

    def names(self, layers: int) -> list[str]:
        """All tensors of the row in a model of `layers`."""
        return [self.name(*index) for index in self.indices(layers)]

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape in the checkpoint of a parameter of `shape` (without the stacked axes)."""
        letters = [letter for group in self.axes for letter in group]
        if len(set(letters)) != len(letters) or len(letters) != len(shape):
            raise ValueError(f"dims {self.dims!r} of {self.key!r} do not fit a parameter of shape {tuple(shape)}")
        size = dict(zip(letters, shape, strict=True))
        return tuple(math.prod(size[letter] for letter in group) for group in self.axes)


def flatten(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Leaves of a nested dict by path."""
    leaves: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flatten(value, (*prefix, key))
        else:
            leaves[(*prefix, key)] = value
    return leaves


def unflatten(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


def aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An uninitialised C-contiguous array whose data XLA's CPU client can use as it is."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT
    return raw[offset : offset + nbytes].view(dtype).reshape(shape)


def _limits(index: slice, size: int) -> tuple[int, int]:
    start, stop, step = index.indices(size)
    if step != 1:
        raise ValueError(f"a sharding asks for every {step}-th slice; only contiguous parts can be read")
    return start, stop


def check_names(source: Checkpoint, wanted: Collection[str], ignored: Collection[str] = ()) -> None:
    """ValueError naming tensors that `wanted` has and the checkpoint lacks, and those that nothing uses.

    `ignored` holds regular expressions of tensors that may be present and carry no information.
    """
    names = set(source.names())
    missing = sorted(set(wanted) - names)
    unused = sorted(n for n in names - set(wanted) if not any(re.fullmatch(p, n) for p in ignored))
    problems = []
    for what, found in (("lacks", missing), ("has tensors that nothing uses:", unused)):
        if found:
            more = f" and {len(found) - 8} more" if len(found) > 8 else ""
            problems.append(f"{what} {', '.join(found[:8])}{more}")
    if problems:
        raise ValueError(f"checkpoint {source}: {'; '.join(problems)}")


def _wrong_dtype(file: str, name: str, dtype: np.dtype) -> str:
    return f"{file}: tensor {name!r} has dtype {dtype}; weights must be one of {[str(d) for d in FLOATS]}"


def common_dtype(source: Checkpoint, names: Collection[str]) -> np.dtype:
    """The one floating dtype of all `names`; ValueError naming two tensors that differ."""
    first: tuple[str, np.dtype] | None = None
    for name in names:
        dtype, _, file = source.describe(name)
        if dtype not in FLOATS:
            raise ValueError(_wrong_dtype(file, name, dtype))
        if first is None:
            first = (name, dtype)
        elif dtype != first[1]:
            raise ValueError(
                f"{file}: tensor {name!r} has dtype {dtype} but {first[0]!r} has {first[1]}; "
                "pass dtype= to load all weights in one"
            )
    if first is None:
        raise ValueError(f"checkpoint {source} holds no tensors")
    return first[1]


def load_arrays(
    source: Checkpoint,
    rows: Sequence[Row],
    shapes: Mapping[tuple[str, ...], Sequence[int]],
    *,
    dtype: np.dtype,
    shardings: Mapping[tuple[str, ...], Sharding] | None = None,
    threads: int | None = None,
) -> dict[tuple[str, ...], jax.Array]:
    """Every parameter of `shapes` from `source`, in `dtype`, by the rows of the table.

    Each (distinct) part that the local devices hold is copied once from the memory map into a fresh buffer,
    which the CPU client then uses in place; with an accelerator one parameter at a time is staged in host
    memory. Without `shardings` everything goes to the default device.

    "Reads" means bytes that are copied. The system reads whole pages, so of a tensor that is split along its last
    dimension (parts of rows, shorter than a page) every process touches all pages.

    Raises ValueError naming the tensor and its file for a dtype that is no supported float or a shape other
    than the one that `shapes` implies. Names are expected to have been checked with `check_names`.
    """
    dtype = np.dtype(dtype)
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be one of {[str(d) for d in FLOATS]}; got {dtype}")
    if sorted(row.path for row in rows) != sorted(shapes):
        raise ValueError(f"table and parameters differ in {sorted({row.path for row in rows} ^ set(shapes))}")
    for row in rows:  # all checks before the first byte of data
        shape = tuple(shapes[row.path])
        expected = row.stored_shape(shape[row.stacked :])
        possible = {expected} if row.other is None else {expected, row.other.shape(expected)}
        for name in row.names(shape[0]):
            found_dtype, found, file = source.describe(name)
            if found_dtype not in FLOATS:
                raise ValueError(_wrong_dtype(file, name, found_dtype))
            if found not in possible:
                raise ValueError(f"{file}: tensor {name!r} has shape {found}; config.json implies {expected}")
    result = {}
    workers = threads or min(16, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        for row in rows:
            read = _Reader(source, row, tuple(shapes[row.path]), dtype, pool, workers)
            result[row.path] = _place(read, None if shardings is None else shardings[row.path])
    return result


@dataclass(frozen=True)
class _Reader:
    """Copies parts of one parameter out of the memory map."""

    source: Checkpoint
    row: Row
    shape: tuple[int, ...]
    dtype: np.dtype
    pool: ThreadPoolExecutor
    workers: int

    def __call__(self, limits: Sequence[tuple[int, int]]) -> np.ndarray:
        """The part between `limits` (start and stop per dimension)."""
        target = aligned_empty([stop - start for start, stop in limits], self.dtype)
        if stacked := self.row.stacked:
            rest = tuple(slice(*limit) for limit in limits[stacked:])
            stored = set(self.row.indices(self.shape[0]))
            parts = []
            for index in itertools.product(*(range(*limit) for limit in limits[:stacked])):
                place = target[tuple(n - start for n, (start, _) in zip(index, limits, strict=False))]
                if index in stored:
                    parts.append((place, self.row.name(*index), rest))
                else:
                    place[...] = 0
        else:
            (first, last), *others = limits
            rest = tuple(slice(*limit) for limit in others)
            step = max(1, -(-(last - first) // self.workers))
            parts = [
                (target[n - first : n - first + step], self.row.key, (slice(n, min(n + step, last)), *rest))
                for n in range(first, last, step)
            ]
        for job in [self.pool.submit(self._copy, *part) for part in parts]:
            job.result()
        return target

    def _copy(self, target: np.ndarray, name: str, index: tuple[slice, ...]) -> None:
        shape = self.shape[self.row.stacked :]
        view = self.source.view(name)
        if self.row.other is not None and view.shape != self.row.stored_shape(shape):
            view = self.row.other.read(view)
        part = view.reshape(shape)[index]
        target[...] = part
        self.source.count(part.nbytes)


def _place(read: _Reader, sharding: Sharding | None) -> jax.Array:
    """One parameter on its devices. Waits for the transfer, so that host buffers do not pile up."""
    shape = read.shape
    if sharding is None:
        return jax.block_until_ready(jax.device_put(read([(0, n) for n in shape])))
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        limits = tuple(_limits(i, n) for i, n in zip(index or (), shape, strict=True))
        holders.setdefault(limits, []).append(device)
    pieces = []
    for limits, devices in holders.items():
        part = read(limits)
        pieces += [jax.block_until_ready(jax.device_put(part, device)) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def to_tensors(
    rows: Sequence[Row],
    params: Mapping[str, Any],
    dtype: np.dtype | None,
    fetch: Callable[[Any, tuple[int, ...]], np.ndarray],
) -> dict[str, LazyTensor]:
    """The checkpoint's tensors of `params`, layer by layer, each read when the writer comes to it.

    `fetch(array, index)` brings one parameter, or what a stacked one has at an index of its first axes, to the host.
    Raises ValueError naming parameters that no row stores, or that rows want and `params` lacks.
    """
    leaves = flatten(params)
    if set(leaves) != {row.path for row in rows}:
        difference = sorted(".".join(p) for p in set(leaves) ^ {row.path for row in rows})
        raise ValueError(f"params and the model's table differ in {', '.join(difference)}")
    tensors: dict[str, LazyTensor] = {}

    def add(row: Row, index: tuple[int, ...]) -> None:
        array = leaves[row.path]
        target = np.dtype(array.dtype) if dtype is None else np.dtype(dtype)
        if target not in FLOATS:
            raise ValueError(f"dtype must be one of {[str(d) for d in FLOATS]}; {'.'.join(row.path)} has {target}")
        shape = row.stored_shape(array.shape[row.stacked :])

        def read() -> np.ndarray:
            return np.asarray(fetch(array, index).reshape(shape), dtype=target, order="C")

        tensors[row.name(*index)] = LazyTensor(shape, target, read)

    stacked = [row for row in rows if row.stacked]
    layers = {leaves[row.path].shape[0] for row in stacked}
    if len(layers) > 1:
        raise ValueError(f"stacked parameters disagree on the number of layers: {sorted(layers)}")
    for row in rows:
        if not row.stacked:
            add(row, ())
    for layer in range(max(layers, default=0)):
        for row in stacked:
            for index in row.indices(max(layers)):
                if index[0] == layer:
                    add(row, index)
    return tensors
