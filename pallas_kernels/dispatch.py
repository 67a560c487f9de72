"""Which implementation an operation takes when its caller names none: rules over a table of measurements.

`measured.json` is derived from the committed GPU results by `python -m benchmarks.dispatch_table`; a test holds the
two together. Per device kind it says which kinds of calls were proven right (`checked`) and how long each
implementation took (`timed`). From it:

1. A GPU implementation is considered only for a kind of call that was checked, with gradients if they are taken.
2. Of those and XLA, the fastest of the nearest timed call of that kind comes first. A kind never timed borrows the
   times of its like (`Kind.alike`); without any, or for sizes below or outside what was timed, XLA is taken.
3. A device of compute capability 9.0 borrows from others of that capability what was not checked or timed on itself,
   since they run the same machine code. What failed on itself stays failed. All others take XLA.
4. `moba_attention` is taken where it was checked: its XLA path, made for little memory, was never timed on a GPU.
5. XLA cannot partition a kernel. With several devices in sight a GPU implementation is considered inside `shard_map`,
   when explicit axes tell how the operands lie (`partition`), and when it tells XLA itself (`partitioning.cut`). Sizes
   are then those of the whole call: what each device will have of it is not known when it is traced.

So an automatic choice may be slower than the best one, never wrong. A choice by name does not come here.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import compat, partitioning

TABLE = Path(__file__).with_name("measured.json")
# Sizes that may exceed every timed one: more of the same work. Others must not.
UNBOUNDED = {
    "flash_attention": ("queries", "keys", "work"),
    "decode_attention": ("keys",),
    "quantized_matmul": ("outputs", "inputs"),
    "pairwise_rotation": ("channels", "rotations"),
    "norm_rope": ("heads",),
}
# Sizes that may lie below half of the smallest timed one. A decoding step over 1,024 cached tokens gained as much time
# from the kernel as one over 8,192 (`benchmarks/results/decode_forward-*`).
SHRINKING = {
    "flash_attention": (),
    "decode_attention": ("rows", "batch", "keys"),
    "quantized_matmul": ("rows",),
    "pairwise_rotation": ("rows", "channels", "rotations"),
    "norm_rope": ("rows", "heads"),
}
OWN_KEYS = "own keys"


class Kind(NamedTuple):
    """What decides which code of an attention kernel a call runs, its sizes apart."""

    mask: str  # type of the mask; of decode_attention: what is attended beside the cache
    dtype: str
    head_dims: str  # of keys/values
    limits: str = ""  # names of the run-time limits, sorted, one blank between; of decode_attention: of its options
    cache: str = ""  # of decode_attention: codes and the form of the scales of keys
    skip: str = ""  # tile that is skipped, rows x width
    square: bool = True  # T = S

    @property
    def name(self) -> str:
        parts = (self.mask, self.dtype, self.head_dims, self.cache, self.limits, self.skip and f"skip {self.skip}")
        return " ".join(part for part in (*parts, "" if self.square else "T!=S") if part)

    def alike(self) -> tuple["Kind", ...]:
        """Kinds whose times speak for this one, best first: itself, then simpler ones that cost both sides alike.

        The limits of flash_attention cost XLA at least what they cost a kernel, which drops dead tiles; float16 runs at
        bfloat16's speed; the form of the scales of codes and a tile of own keys are a small part of either.
        """
        kinds = [self._replace(square=True, mask=self.mask.removesuffix("(token)"))]
        if not self.mask.endswith(OWN_KEYS):
            kinds.append(kinds[-1]._replace(limits=""))
        else:
            kinds.append(kinds[-1]._replace(limits=self.limits.replace("own_lengths", "").strip()))
            kinds.append(kinds[-1]._replace(mask=OWN_KEYS))
            codes = self.cache.split(" ")[0]
            kinds += [kinds[-1]._replace(cache=f"{codes} per {form}") for form in ("token", "head") if codes]
        kinds += [kind._replace(dtype="bfloat16") for kind in kinds]
        return tuple(dict.fromkeys(kinds))


class ProductKind(NamedTuple):
    """The same for a product with a quantized weight."""

    codes: str
    group_size: int  # -1: all inputs
    zeros: bool
    scales: str  # dtype
    result: str  # dtype
    activations: str = ""  # what they are rounded to

    @property
    def name(self) -> str:
        codes = f"{self.codes} by {self.activations}" if self.activations else self.codes
        zeros = "zeros" if self.zeros else "symmetric"
        return f"{codes} groups of {self.group_size} {self.scales} {zeros} to {self.result}"

    def alike(self) -> tuple["ProductKind", ...]:
        """Itself; then with other zeros, scales and results, a small part of the bytes and no part of XLA's time.

        Groups of more than 128 inputs cost a kernel what those of 128 do. Smaller ones cost it more.
        """
        sizes = (self.group_size, *((128,) if self.group_size == -1 or self.group_size > 128 else ()))
        wide = "float16" if self.codes == "int4" else "float32"
        grids = [(zeros, scales) for zeros in (self.zeros, True) for scales in (self.scales, wide)]
        results = (self.result, *(name for name in ("float32", "bfloat16") if name != self.result))
        kinds = [
            self._replace(group_size=size, zeros=zeros, scales=scales, result=result)
            for size in sizes
            for zeros, scales in grids
            for result in results
        ]
        return tuple(dict.fromkeys(kinds))


class RotationKind(NamedTuple):
    """The same for a rotation of activations."""

    group_size: int
    steps: int
    dtype: str
    source: str = ""  # of the rows, if the kernel makes them: "normed", "normed sum", "gated"

    @property
    def name(self) -> str:
        return f"{self.steps} steps in groups of {self.group_size} {self.dtype} {self.source}".rstrip()

    def alike(self) -> tuple["RotationKind", ...]:
        """Itself, then groups of 128 in bfloat16: a group is a small part of either side's time."""
        return tuple(dict.fromkeys((self, self._replace(group_size=128, dtype="bfloat16"))))


class NormRopeKind(NamedTuple):
    """The same for norm and rotary embedding of heads."""

    head_dim: int
    dtype: str
    weights: str  # dtype
    partial: bool = False  # heads in parts

    @property
    def name(self) -> str:
        return f"{self.head_dim} {self.dtype} weights {self.weights}" + " in parts" * self.partial

    def alike(self) -> tuple["NormRopeKind", ...]:
        """Itself, then 128 channels in bfloat16: starting kernels is most of either side's time."""
        return tuple(dict.fromkeys((self, NormRopeKind(128, "bfloat16", "bfloat16", self.partial))))


class MobaKind(NamedTuple):
    """The same for block-routed attention."""

    dtype: str
    head_dim: int
    block_size: int
    packed: bool

    @property
    def name(self) -> str:
        """Larger blocks are attended in pieces of 128 keys."""
        return f"{self.dtype} {self.head_dim} blocks of {min(self.block_size, 128)}" + " packed" * self.packed

    def alike(self) -> tuple["MobaKind", ...]:
        return (self,)


AnyKind = Kind | ProductKind | RotationKind | NormRopeKind | MobaKind


@functools.cache
def table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


def default_device() -> Any:
    device = jax.config.jax_default_device or jax.devices()[0]
    return jax.devices(device)[0] if isinstance(device, str) else device


def preferred(
    op: str,
    kind: AnyKind,
    sizes: Mapping[str, int],
    *,
    gradients: bool,
    device: Any = None,
    measured: Mapping[str, Any] | None = None,
) -> tuple[tuple[str, ...], str]:
    """Names of implementations to try, the best first and always with "xla" last, and why not more, in words.

    Args:
      op: name of the operation.
      kind: of the call.
      sizes: of the call, those of the operation's timed calls.
      gradients: whether the call must be able to give them.
      device: what runs it; None is the default device.
      measured: the table; None is the project's.
    """
    checked, known, reason = proven(op, kind, gradients=gradients, device=device, measured=measured)
    if not checked:
        return ("xla",), reason
    for row in known:
        times, reason = nearest(op, row["timed"], kind, sizes, gradients)
        if times is not None:
            order = sorted((name for name in times if name == "xla" or name in checked), key=times.__getitem__)
            order = order[: order.index("xla") + 1]
            slow = [name for name in checked if name not in order]
            return tuple(order), f"slower than XLA in the nearest timed call: {', '.join(slow)}" if slow else ""
    return ("xla",), reason


def proven(
    op: str,
    kind: AnyKind,
    *,
    gradients: bool,
    device: Any = None,
    measured: Mapping[str, Any] | None = None,
) -> tuple[list[str], list[Mapping[str, Any]], str]:
    """GPU implementations that checks cover, the rows of the table that speak for the device, and why none, in words.

    The arguments are those of `preferred`.
    """
    device = default_device() if device is None else device
    rows = (table() if measured is None else measured)[op]
    if device.platform != "gpu":
        return [], [], f"the default device is {device.platform}, not an NVIDIA GPU"
    known = [rows[device.device_kind]] if device.device_kind in rows else []
    if str(getattr(device, "compute_capability", "")) == "9.0":
        known += [row for name, row in rows.items() if name != device.device_kind]
    if not known:
        return [], [], f"nothing is measured on {device.device_kind}"
    names = dict.fromkeys(name for row in known for name in row["checked"])
    checked = [name for name in names if covers(known, name, kind, gradients)]
    how = "with gradients" if gradients else "forward"
    return checked, known, "" if checked else f"no committed GPU check covers {kind.name} {how}"


def covers(rows: Sequence[Mapping[str, Any]], name: str, kind: AnyKind, gradients: bool) -> bool:
    """Whether the first of the devices that checked an implementation of this kind of call found it right."""
    for row in rows:
        kinds = row["checked"].get(name, {})
        if kind.name in kinds.get("gradients", ()) or (not gradients and kind.name in kinds.get("forward", ())):
            return True
        if kind.name in kinds.get("failed", ()):
            return False
    return False


def nearest(
    op: str, timed: list[dict[str, Any]], kind: AnyKind, sizes: Mapping[str, int], gradients: bool
) -> tuple[dict[str, float] | None, str]:
    """Milliseconds by implementation in the timed call that is nearest in its sizes; or None, and why."""
    for like in kind.alike():
        points = [point for point in timed if point["kind"] == like.name and point["gradients"] == gradients]
        if points:
            break
    else:
        return None, f"no committed timing of {kind.name} {'with gradients' if gradients else 'forward'}"
    for size, value in sizes.items():
        values = [point["sizes"][size] for point in points]
        if 2 * value < min(values) and size not in SHRINKING[op]:
            return None, f"{size}={value} is less than half of the smallest timed, {min(values)}"
        if value > max(values) and size not in UNBOUNDED[op]:
            return None, f"{size}={value} is more than the largest timed, {max(values)}"

    def distance(point: Mapping[str, Any]) -> float:
        return sum(math.log2(value / point["sizes"][size]) ** 2 for size, value in sizes.items())

    return min(points, key=distance)["ms"], ""


# ---------------------------------------------------------------------------------------------------------------
# Several devices


def partition(q: Any, *others: Any, is_cut: bool = False) -> tuple[PartitionSpec | None, str | None]:
    """How a kernel must be called on the devices in sight, for `q [B, T, N, H]` and others of these axes.

    `is_cut` says that the kernel tells XLA by `partitioning.cut` how it may be divided.

    Returns (None, None) to call it as it is; (spec, None) for a `shard_map` with this spec of batch and heads; or
    (None, why it cannot be called).
    """
    if jax.device_count() == 1:
        return None, None
    mesh = jax.sharding.get_abstract_mesh()
    kinds = set(mesh.axis_types) if not mesh.empty else set()
    if kinds == {AxisType.Manual}:
        if compat.varying_axes(q):
            return None, "inside shard_map a kernel has gradients only with check_vma=False"
        return None, None
    if partitioning.is_automatic():
        return (None, None) if is_cut else (None, f"{jax.device_count()} devices: XLA cannot partition this kernel")
    if kinds != {AxisType.Explicit}:
        return None, "a mesh with axes of several types: XLA cannot partition a kernel there"
    spec, *rest = (jax.typeof(x).sharding.spec for x in (q, *others))
    if spec[1] is not None or spec[3] is not None or any(other != spec for other in rest):
        lie = ", ".join(str(x) for x in (spec, *rest))
        return None, f"operands lie as {lie}; a kernel is cut by batch and heads, alike in all of them"
    return spec, None


def undivided(*, is_cut: bool = False) -> str | None:
    """Why a kernel cannot be called as it is on the devices in sight; None when it can.

    `is_cut` says that the kernel tells XLA by `partitioning.cut` how it may be divided.
    """
    if jax.device_count() == 1 or (is_cut and partitioning.is_automatic()):
        return None
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and set(mesh.axis_types) == {AxisType.Manual}:
        return None
    return f"{jax.device_count()} devices: XLA cannot partition this kernel; call it under shard_map"


def sharded(call: Callable[..., Any], spec: PartitionSpec) -> Callable[..., Any]:
    """`call(q, k, v, limits, log_threshold)` of flash_attention, each device with its own part of batch and heads."""
    rows, _, heads, _ = spec

    def on_each(q, k, v, limits, log_threshold):
        limits, log_threshold = (
            jax.tree.map(lambda x: jax.sharding.reshard(x, PartitionSpec(rows, *(None,) * (x.ndim - 1))), tree)
            for tree in (limits, log_threshold)
        )
        # Prefixes of the trees (output, log-sum-exp, kept tiles), of which some are None.
        out_specs = (spec, PartitionSpec(rows, heads), PartitionSpec(rows, heads))
        in_specs = (spec, spec, spec, PartitionSpec(rows), PartitionSpec(rows))
        mapped = jax.shard_map(call, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return mapped(q, k, v, limits, log_threshold)

    return on_each


# ---------------------------------------------------------------------------------------------------------------
# Gradients


def by_derivative(forward: Callable[..., Any], gradient: Callable[..., Any]) -> Callable[..., Any]:
    """`forward(q, k, v, *rest)`, but `gradient(q, k, v, *rest)` and its derivative where one is taken.

    `rest` are arrays, or trees of them, without gradients.
    """

    @jax.custom_vjp
    def call(q, k, v, *rest):
        return forward(q, k, v, *rest)

    def call_fwd(q, k, v, *rest):
        results, pull = jax.vjp(lambda q, k, v: gradient(q, k, v, *rest), q, k, v)
        return results, (pull, rest)

    def call_bwd(residuals, cotangents):
        pull, rest = residuals
        return (*pull(cotangents), *(None for _ in rest))

    call.defvjp(call_fwd, call_bwd)
    return call
