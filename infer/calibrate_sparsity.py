"""`python -m infer calibrate-sparsity`: thresholds of skip-softmax attention for one model, into its config.json.

JAX is imported by `main`, not by this module.
"""

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from infer.console import CompileNotes, note, timed

if TYPE_CHECKING:
    import numpy as np

    from jaxmodels.sparse_attention import ScaleFit


@dataclasses.dataclass(frozen=True)
class CalibrateSparsity:
    """Measure what many thresholds would skip on text of your kind, and store the law in the model's config.json.

    python -m infer calibrate-sparsity --model DIR --data FILES --target-sparsity 0.5

    Samples of several lengths are cut from the text and read once each, densely. Afterwards any target sparsity can be
    asked for: python -m infer text --model DIR --target-sparsity 0.6
    """

    model: str
    """Directory with config.json and safetensors, or a Hugging Face repository org/name (then with --output)."""
    data: tuple[Path, ...]
    """UTF-8 text files, or .jsonl files with the text of one document a line; long documents, like those to be read."""
    target_sparsity: float = 0.5
    """Share of tiles to skip that is stored as the model's own choice and checked on samples that were not fitted."""
    samples: int = 24
    """Samples in all; of each length one is kept for the check if there are two."""
    max_length: int = 32768
    """Tokens of the longest samples."""
    length_bins: int = 4
    """Lengths: the longest, half of it, a quarter, and so on."""
    decode_tokens: int = 10
    """Last tokens of each sample that are counted as decode steps; 0 calibrates prefills only."""
    rows: int = 64
    """Queries that vote together in prefills; must be that of the kernels that will run."""
    width: int = 128
    """Keys of a tile in prefills."""
    decode_width: int = 128
    """Keys of a tile in decode steps."""
    decode_chains: int = 8
    """Independent chains of tiles in decode steps."""
    text_field: str = "text"
    """Field of .jsonl lines that holds the text."""
    output: Path | None = None
    """Write the block to this JSON file and leave config.json alone."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type of weights and computation; default: the checkpoint's."""
    quiet: bool = False
    """Print no progress."""

    def __post_init__(self):
        for name in ("samples", "max_length", "length_bins", "rows", "width", "decode_width", "decode_chains"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.decode_tokens < 0:
            raise ValueError(f"decode_tokens must not be negative; got {self.decode_tokens}")
        if not 0.0 < self.target_sparsity < 1.0:
            raise ValueError(f"target_sparsity must lie in (0, 1); got {self.target_sparsity}")
        if not self.data:
            raise ValueError("data must name at least one file")
        if self.samples < self.length_bins:
            raise ValueError(f"samples must be at least length_bins={self.length_bins}; got {self.samples}")
        if self.max_length >> (self.length_bins - 1) < 2 * self.width:
            raise ValueError(
                f"the shortest samples, max_length={self.max_length} / 2^{self.length_bins - 1}, must hold two "
                f"tiles of {self.width} keys; lower length_bins or width"
            )


@dataclasses.dataclass(frozen=True)
class Measured:
    """Shares of skipped tiles of one phase: `sparsity[i, j]` of sample i at trial threshold j."""

    lengths: list[int]
    sparsity: "np.ndarray"


def read_documents(files: tuple[Path, ...], text_field: str) -> Iterator[str]:
    """The documents of all files. Raises ValueError naming file and line."""
    for file in files:
        try:
            content = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"data file {file}: {error}") from None
        if file.suffix != ".jsonl":
            yield content
            continue
        for number, line in enumerate(content.splitlines(), 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[text_field]
            except (json.JSONDecodeError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise ValueError(
                    f"data file {file}, line {number}: must be a JSON object with text under {text_field!r}"
                )
            yield text


def cut_samples(documents: Iterator[str], encode: Any, sizes: list[int]) -> "list[np.ndarray]":
    """Samples of these sizes, one after the other from the tokens of the documents put end to end.

    Raises ValueError when the documents hold too few tokens; reads no more of them than needed.
    """
    import numpy as np

    needed = sum(sizes)
    tokens: list[int] = []
    for document in documents:
        tokens.extend(encode(document))
        if len(tokens) >= needed:
            break
    if len(tokens) < needed:
        raise ValueError(
            f"data holds {len(tokens)} tokens, {len(sizes)} samples of up to {max(sizes)} need {needed}: give more "
            "text, or lower --samples or --max-length"
        )
    ends = np.cumsum(sizes)
    return [np.asarray(tokens[end - size : end], np.int32) for end, size in zip(ends, sizes, strict=True)]


def main(config: CalibrateSparsity) -> int:
    """Runs the task; returns the exit code."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxmodels.pretrained import load_pretrained
    from jaxmodels.sparse_attention import Phase, SkipMeasure, SkipSoftmaxConfig
    from jaxmodels.sparse_attention.calibration import TRIAL_THRESHOLDS
    from pallas_kernels.attention.skip import SkipTile

    directory = Path(config.model)
    if config.output is None and not directory.is_dir():
        raise ValueError(f"{config.model} is not a local directory, so that its config.json stays; give --output FILE")
    with timed(f"loading {config.model}", config.quiet):
        model = load_pretrained(config.model, dtype=config.dtype)
    if model.tokenizer is None:
        raise ValueError(f"{config.model}: has no tokenizer.json, which reading --data needs")
    if config.max_length > model.config.max_positions:
        raise ValueError(
            f"max_length must be at most the model's {model.config.max_positions} positions; got {config.max_length}"
        )
    if not any(layer.full for layer in model.config.layer_attention):
        raise ValueError(f"{config.model}: no layer has full attention, and others skip nothing")

    lengths = [config.max_length >> i for i in reversed(range(config.length_bins))]
    sizes = [lengths[i % len(lengths)] for i in range(config.samples)]
    documents = read_documents(config.data, config.text_field)
    samples = cut_samples(documents, model.tokenizer.encode, sorted(sizes))
    # The last sample of each length is for the check, where there are two.
    held_out = {length: i for i, length in enumerate(map(len, samples)) if sizes.count(length) > 1}

    prefill = SkipTile(config.rows, config.width)
    decode = SkipTile(width=config.decode_width, chains=config.decode_chains) if config.decode_tokens else None
    options: dict[str, Any] = {"prefill": prefill, "decode": decode, "decode_tokens": max(1, config.decode_tokens)}

    @jax.jit
    def count(params: Any, tokens: jax.Array, measure: SkipMeasure) -> Any:
        counts = model.lm.hidden(params, tokens, skip_measure=measure).skip_counts
        return jax.tree.map(lambda x: x[:, 0].astype(jnp.float32).sum(axis=0), counts)  # all layers, the one row

    programs: dict[int, Any] = {}  # by length
    on_compile = CompileNotes(config.quiet)

    def shares(sample: np.ndarray, thresholds: Sequence[float]) -> dict[str, np.ndarray]:
        measure = SkipMeasure.create(thresholds, **options)
        name = f"{len(sample)} tokens"
        if len(sample) not in programs:
            on_compile(name, None)
            started = time.perf_counter()
            programs[len(sample)] = count.lower(model.params, sample[None], measure).compile()
            on_compile(name, time.perf_counter() - started)
        counts = jax.device_get(programs[len(sample)](model.params, sample[None], measure))
        result = {"prefill": counts.skipped / max(1.0, float(counts.visited))}
        if decode is not None:
            result["decode"] = counts.decode_skipped / max(1.0, float(counts.decode_visited))
        return result

    found: list[dict[str, np.ndarray]] = []
    for i, sample in enumerate(samples):
        started = time.perf_counter()
        found.append(shares(sample, TRIAL_THRESHOLDS))
        if not config.quiet:
            note(f"sample {i + 1} of {len(samples)}: {len(sample)} tokens, {time.perf_counter() - started:.1f} s")

    phases: dict[str, Phase] = {}
    for name, tile in (("prefill", prefill), ("decode", decode)):
        if tile is None:
            continue
        fitted = [i for i in range(len(samples)) if i not in held_out.values()]
        measured = Measured([len(samples[i]) for i in fitted], np.stack([found[i][name] for i in fitted]))
        print("\n".join(_table(name, measured, TRIAL_THRESHOLDS)), flush=True)
        phases[name] = Phase(_fit(name, measured, config.target_sparsity), None, config.target_sparsity, tile)
    factors = {name: phase.fit.scale_factor(config.target_sparsity) for name, phase in phases.items() if phase.fit}
    for name, phase in phases.items():
        print(f"{name}: scale factor = {phase.fit.a:.6g} * exp({phase.fit.b:.6g} * target sparsity)")  # type: ignore[union-attr]
    for length, i in held_out.items():
        chosen = {name: factor / length for name, factor in factors.items()}
        inside = {name: value for name, value in chosen.items() if value < 1.0}
        levels = [inside.get(name, 0.5) for name in phases]
        levels += levels[:1] * (len(TRIAL_THRESHOLDS) - len(levels))  # as many as the compiled program takes
        got = shares(samples[i], levels)
        parts = [
            f"{name} {got[name][j]:.3f} (λ = {chosen[name]:.3g})" if name in inside else f"{name} dense (λ >= 1)"
            for j, name in enumerate(phases)
        ]
        print(f"check at {length} tokens, target {config.target_sparsity:g}: {', '.join(parts)}")

    before = model.sparse_attention
    block = SkipSoftmaxConfig(
        phases.get("prefill"),
        phases.get("decode"),
        ignore=() if before is None else before.ignore,
        targets=() if before is None else before.targets,
    )
    print(_store(config, directory, block.to_hf()))
    return 0


def _fit(phase: str, measured: Measured, target: float) -> "ScaleFit":
    """The law of one phase. Raises ValueError when the target lies outside of what was measured."""
    from jaxmodels.sparse_attention import fit_threshold_scale
    from jaxmodels.sparse_attention.calibration import TRIAL_THRESHOLDS

    most = float(measured.sparsity.max())
    if target > most:
        raise ValueError(
            f"target_sparsity {target:g} was not reached in {phase}: the largest threshold, {max(TRIAL_THRESHOLDS):g}, "
            f"skipped {most:.3f}; give longer samples (--max-length), a smaller tile, or a lower target"
        )
    try:
        return fit_threshold_scale(TRIAL_THRESHOLDS, measured.lengths, measured.sparsity, least=min(0.1, target / 2))
    except ValueError as error:
        raise ValueError(f"{phase}: {error}") from None


def _table(phase: str, measured: Measured, thresholds: tuple[float, ...]) -> Iterator[str]:
    """Lines of measured sparsity: a row per threshold, a column per length, mean over samples."""
    columns = sorted(set(measured.lengths))
    yield f"{phase}: share of skipped tiles"
    yield "λ".rjust(8) + "".join(f"{length:>10}" for length in columns)
    for j, threshold in enumerate(thresholds):
        shares = []
        for length in columns:
            rows = [i for i, other in enumerate(measured.lengths) if other == length]
            shares.append(math.fsum(measured.sparsity[rows, j]) / len(rows))
        yield f"{threshold:>8g}" + "".join(f"{share:>10.3f}" for share in shares)


def _store(config: CalibrateSparsity, directory: Path, block: dict[str, Any]) -> Path:
    """Writes the block in one step; returns where it is."""
    from jaxmodels.checkpoints.huggingface import read_json, write_json
    from jaxmodels.sparse_attention.config import KEY

    if config.output is not None:
        write_json(config.output, {KEY: block})
        return config.output
    path = directory / "config.json"
    write_json(path, {**read_json(path), KEY: block})
    return path
