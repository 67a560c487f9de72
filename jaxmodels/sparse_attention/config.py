"""`sparse_attention_config` of a checkpoint's config.json: thresholds that were calibrated for its weights.

Layouts in the field, all read:

1. ModelOpt and TensorRT-LLM for language models: `config_groups.<name>` with `algorithm: "skip_softmax"` and
   `threshold_scale_factor: {formula, prefill: {a, b}, decode: {a, b}}`, `target_sparsity` a number or one per phase,
   `ignore` with fnmatch patterns of layers that stay dense. `threshold_scale_factor` may also be numbers.
2. The same for diffusion models: `coefficients: {a, b}` instead of phases, and `disabled_until_timestep`.
3. Older: `sparse_algo: "softmax_skip"`, with `{prefill: {a, b}, decode: {a, b}}` in the group or beside the groups, and
   `target_sparse_ratio`.

Any of them may carry `log_a` for `a`. We write the first, and add `skip_tile`, the geometry that was calibrated: with
another one the same threshold skips another share. Other readers ignore the key.
"""

import dataclasses
import fnmatch
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pallas_kernels.attention.skip import SkipTile

log = logging.getLogger("jaxstream")

PhaseName = Literal["prefill", "decode"]
PHASES: tuple[PhaseName, ...] = ("prefill", "decode")
FORMULA = "a * exp(b * target_sparsity)"
KEY = "sparse_attention_config"
_BLOCK = {"config_groups", "producer"}
_GROUP = {
    "algorithm", "sparse_algo", "targets", "ignore", "threshold_scale_factor", "target_sparsity", "target_sparse_ratio",
    "disabled_until_timestep", "skip_tile", *PHASES,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ScaleFit:
    """scale factor = a · exp(b · target sparsity), and λ = scale factor / L."""

    a: float
    b: float

    def __post_init__(self):
        if not (math.isfinite(self.a) and self.a > 0 and math.isfinite(self.b)):
            raise ValueError(f"coefficients must be finite and a positive; got a={self.a} and b={self.b}")

    def scale_factor(self, target_sparsity: float) -> float:
        return self.a * math.exp(self.b * check_target("target_sparsity", target_sparsity))


@dataclasses.dataclass(frozen=True)
class Phase:
    """What a checkpoint says about one phase.

    Attributes:
      fit: from a target sparsity to a scale factor.
      factor: a scale factor that was chosen already.
      target_sparsity: the checkpoint's own choice of target.
      tile: what was calibrated with; None: the file does not say.
    """

    fit: ScaleFit | None = None
    factor: float | None = None
    target_sparsity: float | None = None
    tile: SkipTile | None = None


@dataclasses.dataclass(frozen=True)
class SkipSoftmaxConfig:
    """A `sparse_attention_config`.

    Attributes:
      prefill, decode: None: this phase is dense.
      ignore: fnmatch patterns of attention layers that stay dense, such as "model.layers.0.self_attn".
      targets: class names of the attention the block speaks of; kept, without effect.
      disabled_until_timestep: diffusion: dense while the normalised timestep is above this.
    """

    prefill: Phase | None = None
    decode: Phase | None = None
    ignore: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    disabled_until_timestep: float | None = None

    def phase(self, name: PhaseName) -> Phase:
        """Raises ValueError when the checkpoint was not calibrated for this phase."""
        found = {"prefill": self.prefill, "decode": self.decode}.get(name)
        if found is None:
            raise ValueError(f"{KEY} has nothing for {name!r}; calibrate it: python -m infer calibrate-sparsity")
        return found

    def scale_factor(self, name: PhaseName, target_sparsity: float | None = None) -> float:
        """The scale factor of a phase for a target, or without one for the checkpoint's own choice.

        Raises:
          ValueError: the phase was not calibrated, or the checkpoint makes no choice.
        """
        phase = self.phase(name)
        if target_sparsity is None and phase.factor is not None:
            return phase.factor
        target = phase.target_sparsity if target_sparsity is None else target_sparsity
        if target is None:
            raise ValueError(f"{KEY} names no target sparsity for {name!r}; give one")
        if phase.fit is None:
            raise ValueError(
                f"{KEY} has the scale factor {phase.factor} for {name!r} but no coefficients, so that no target "
                f"sparsity can be asked for; got {target}"
            )
        return phase.fit.scale_factor(target)

    def dense_layers(self, names: Sequence[str]) -> tuple[int, ...]:
        """Which of the layers, by full name, a pattern of `ignore` takes out; a pattern that fits none is logged."""
        chosen = set()
        for pattern in self.ignore:
            fits = [i for i, name in enumerate(names) if _fits(name, pattern)]
            if not fits:
                log.warning("%s: the ignore pattern %r fits no attention layer", KEY, pattern)
            chosen.update(fits)
        return tuple(sorted(chosen))

    @classmethod
    def from_hf(cls, block: Any) -> "SkipSoftmaxConfig":
        """From the content of `sparse_attention_config`, in any of the layouts above.

        Raises:
          ValueError: another algorithm, another formula, missing or impossible numbers, unknown keys.
        """
        if not isinstance(block, Mapping):
            raise ValueError(f"{KEY} must be an object; got {block!r}")
        groups = block.get("config_groups", {})
        if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
            raise ValueError(f"{KEY}.config_groups must be an object of objects; got {groups!r}")
        if len(groups) > 1:
            raise ValueError(f"{KEY} has the groups {[*groups]}; implemented: one")
        # The older layout keeps numbers beside the groups; merged, both read alike.
        beside = {key: value for key, value in block.items() if key not in _BLOCK}
        group: dict[str, Any] = {**next(iter(groups.values()), {})}
        for key, value in beside.items():
            if key in group:
                raise ValueError(f"{KEY} has {key!r} twice, in its group and beside it")
            group[key] = value
        unknown = sorted(set(group) - _GROUP)
        if unknown:
            raise ValueError(f"{KEY}: unknown key {unknown[0]!r} = {group[unknown[0]]!r}; it may change the model")
        algorithm = group.get("algorithm", group.get("sparse_algo", "skip_softmax"))
        if algorithm not in ("skip_softmax", "softmax_skip"):
            raise ValueError(f'{KEY}: algorithm {algorithm!r} is not implemented; implemented: "skip_softmax"')
        if algorithm not in group.values() and not any(key in group for key in ("threshold_scale_factor", *PHASES)):
            raise ValueError(f"{KEY} names no algorithm and no threshold_scale_factor: {block!r}")
        scale = group.get("threshold_scale_factor", {key: group[key] for key in PHASES if key in group})
        targets = group.get("target_sparsity", group.get("target_sparse_ratio"))
        tiles = group.get("skip_tile", {})
        if not isinstance(tiles, Mapping) or set(tiles) - set(PHASES):
            raise ValueError(f"{KEY}: skip_tile must have the keys {PHASES} only; got {tiles!r}")
        phases = {}
        for name in PHASES:
            fit, factor = _threshold(scale, name)
            if fit is None and factor is None:
                continue
            target = targets.get(name) if isinstance(targets, Mapping) else targets
            if target is not None:
                target = check_target(f"{KEY}: target_sparsity of {name!r}", target)
            phases[name] = Phase(fit, factor, target, _tile(tiles.get(name), name))
        until = group.get("disabled_until_timestep")
        if until is not None and not (_is_number(until) and 0.0 <= until <= 1.0):
            raise ValueError(f"{KEY}: disabled_until_timestep must lie in [0, 1]; got {until!r}")
        return cls(
            phases.get("prefill"),
            phases.get("decode"),
            _strings(group, "ignore"),
            _strings(group, "targets"),
            until,
        )

    def to_hf(self) -> dict[str, Any]:
        """The block as we write it: the first layout, with `skip_tile`."""
        group: dict[str, Any] = {"algorithm": "skip_softmax"}
        scale: dict[str, Any] = {}
        targets, tiles = {}, {}
        for name, phase in (("prefill", self.prefill), ("decode", self.decode)):
            if phase is None:
                continue
            if phase.fit is not None:
                scale |= {"formula": FORMULA, name: {"a": phase.fit.a, "b": phase.fit.b}}
            elif phase.factor is not None:
                scale[name] = phase.factor
            if phase.target_sparsity is not None:
                targets[name] = phase.target_sparsity
            if phase.tile is not None:
                tiles[name] = {field: getattr(phase.tile, field) for field in _TILE_FIELDS[name]}
        group["threshold_scale_factor"] = scale
        for key, value in (
            ("target_sparsity", targets),
            ("skip_tile", tiles),
            ("ignore", [*self.ignore]),
            ("targets", [*self.targets]),
        ):
            if value:
                group[key] = value
        if self.disabled_until_timestep is not None:
            group["disabled_until_timestep"] = self.disabled_until_timestep
        return {"config_groups": {"group_0": group}, "producer": {"name": "jaxstream"}}


_TILE_FIELDS = {"prefill": ("rows", "width"), "decode": ("width", "chains")}


def check_target(name: str, value: Any) -> float:
    if not (_is_number(value) and 0.0 <= value < 1.0):
        raise ValueError(f"{name} must lie in [0, 1); got {value!r}")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fits(name: str, pattern: str) -> bool:
    """Patterns are written against the full name or the one inside the decoder, "layers.0.self_attn"."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.removeprefix("model."), pattern)


def _strings(group: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = group.get(key) or ()
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{KEY}: {key} must be a list of strings; got {value!r}")
    return tuple(value)


def _threshold(scale: Any, phase: PhaseName) -> tuple[ScaleFit | None, float | None]:
    """Coefficients or a fixed factor of one phase, (None, None) if there is neither."""
    where = f"{KEY}: threshold_scale_factor"
    if _is_number(scale):
        value = scale  # one number for both phases
    elif not isinstance(scale, Mapping):
        raise ValueError(f"{where} must be a number or an object; got {scale!r}")
    else:
        unknown = sorted(set(scale) - {"formula", "coefficients", *PHASES})
        if unknown:
            raise ValueError(f"{where}: unknown key {unknown[0]!r} = {scale[unknown[0]]!r}")
        formula = scale.get("formula", FORMULA)
        if not isinstance(formula, str) or formula.replace(" ", "") != FORMULA.replace(" ", ""):
            raise ValueError(f"{where}: formula {formula!r} is not implemented; implemented: {FORMULA!r}")
        # A diffusion model has one phase, and its coefficients stand alone.
        value = scale.get(phase, scale.get("coefficients") if phase == "prefill" else None)
    if value is None:
        return None, None
    if _is_number(value):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{where} of {phase!r} must be positive and finite; got {value!r}")
        return None, float(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} of {phase!r} must be a number or coefficients; got {value!r}")
    known = {"a", "log_a", "b", "min_observed_sparsity", "max_observed_sparsity"}
    if (unknown := sorted(set(value) - known)) or ("a" in value) == ("log_a" in value) or "b" not in value:
        extra = f"unknown key {unknown[0]!r}; " if unknown else ""
        raise ValueError(f"{where} of {phase!r} must have 'b' and either 'a' or 'log_a'; {extra}got {dict(value)!r}")
    numbers = {key: value[key] for key in ("a", "log_a", "b") if key in value}
    if not all(_is_number(number) for number in numbers.values()):
        raise ValueError(f"{where} of {phase!r}: coefficients must be numbers; got {numbers!r}")
    a = numbers["a"] if "a" in numbers else math.exp(numbers["log_a"])
    try:
        return ScaleFit(float(a), float(numbers["b"])), None
    except ValueError as error:
        raise ValueError(f"{where} of {phase!r}: {error}") from None


def _tile(value: Any, phase: PhaseName) -> SkipTile | None:
    if value is None:
        return None
    fields = _TILE_FIELDS[phase]
    if not isinstance(value, Mapping) or set(value) != set(fields):
        raise ValueError(f"{KEY}: skip_tile of {phase!r} must have the keys {fields}; got {value!r}")
    return SkipTile(**value)
