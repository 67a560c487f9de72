"""Recipe `paroquant`: a model with 4-bit weights whose channels are scaled and rotated first.

Below `directory`:

    rows/                     the calibration text as rows of tokens
    config.json               what this run is; another one is refused
    blocks/block_NNN.safetensors    one per finished block: a stopped run goes on after the last one
    report.json, report.png   error of every block and linear, size, and quality on held-out text
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from train.config import MeshConfig, to_json
from train.machine import command_line, machine
from train.paroquant.config import ParoquantConfig
from train.recipes.text import Flat, RowsConfig, open_model, open_rows

if TYPE_CHECKING:  # importing a recipe must stay quick: `--help` imports it
    import numpy as np

    from train.data import RowStore
    from train.paroquant.quality import Quality
    from train.paroquant.whole import BlockReport


@dataclasses.dataclass(frozen=True)
class Paroquant:
    """Quantize a model to INT4 with pairwise rotations, and write it as a checkpoint that other tools read.

    python -m train paroquant --model DIR --data FILES --out DIR

    Any text will do that is of the kind that the model is for. One block is optimised after the other; the same command
    continues an interrupted run.
    """

    model: str
    """Hugging Face directory (or org/name) with config.json, tokenizer.json and dense weights."""
    data: tuple[Path, ...]
    """Files or directories of text, JSONL or Parquet; or one directory of packed rows."""
    out: Path
    """Where the quantized model goes."""
    directory: Path | None = None
    """Everything of this run; None: OUT.run."""
    rows: RowsConfig = dataclasses.field(default_factory=lambda: RowsConfig(seq_len=2048))
    samples: int = 2048
    """Rows to optimise on."""
    validation_samples: int = 64
    """Held-out rows that choose the best epoch and that the report is about."""
    quantization: Flat[ParoquantConfig] = dataclasses.field(default_factory=ParoquantConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of forward and backward passes; None: bfloat16 on a GPU, float32 on a CPU."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of what stays dense in the written model; None: that of the original."""

    def __post_init__(self):
        for name in ("samples", "validation_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.samples < self.quantization.batch_size:
            raise ValueError(f"samples must be at least batch_size={self.quantization.batch_size}; got {self.samples}")
        if not 0 < self.rows.validation_fraction < 1:
            raise ValueError(f"rows.validation_fraction must be positive; got {self.rows.validation_fraction}")


def main(config: Paroquant) -> int:
    """Runs the recipe; 0 when the model is written."""
    import jax
    import jax.numpy as jnp

    from jaxmodels import save_pretrained
    from jaxmodels.quantization import round_params
    from train.checkpointing import RunLock, check_identity
    from train.mesh import check_batch, make_mesh
    from train.metrics import Reporter
    from train.paroquant.quality import measure_quality
    from train.paroquant.whole import quantize_model

    if jax.process_count() > 1:
        raise ValueError("paroquant runs in one process, on all of its devices")
    directory = config.directory or config.out.with_name(f"{config.out.name}.run")
    mesh = make_mesh(config.mesh)
    check_batch(mesh, config.quantization.batch_size, 1)
    reporter = Reporter()
    model = open_model(config.model, mesh)
    assert model.create is not None
    directory.mkdir(parents=True, exist_ok=True)
    lock = RunLock(directory)
    try:
        text = open_rows(config.data, config.rows, model, directory)
        assert text.validation is not None
        train = choose_rows(text.train, config.samples, config.quantization.seed, "samples")
        held_out = choose_rows(
            text.validation, config.validation_samples, config.quantization.seed, "validation_samples"
        )
        identity = {
            "model": config.model,
            "architecture": to_json(model.lm.config),
            "data": text.identity,
            "samples": config.samples,
            "validation_samples": config.validation_samples,
            "quantization": to_json(config.quantization),
        }
        about = directory / "config.json"
        if about.is_file():
            check_identity(json.loads(about.read_text())["identity"], identity, directory)
        about.write_text(json.dumps({"config": to_json(config), "identity": identity}, indent=1) + "\n")
        params = model.create()
        dtype = config.compute_dtype or ("bfloat16" if jax.default_backend() == "gpu" else "float32")
        quantized, blocks = quantize_model(
            model.lm, params, train, held_out, config.quantization,
            directory=directory / "blocks", mesh=mesh, dtype=jnp.dtype(dtype), report=reporter.line,
        )  # fmt: skip
        save_pretrained(
            config.out, model.lm, quantized, tokenizer=model.tokenizer, generation=model.generation,
            dtype=config.dtype or model.dtype,
        )  # fmt: skip
        reporter.line("measuring quality on held-out rows")
        size = config.quantization.group_size
        nearest = jax.jit(lambda params: round_params(model.lm, params, "int4", group_size=size))(params)
        num_bytes = _bytes(model.tokenizer, held_out)
        quality = {
            name: measure_quality(model.lm, params, own, held_out, num_bytes=num_bytes)
            for name, own in (("original", params), ("nearest", nearest), ("paroquant", quantized))
        }
        report = _report(config, params, quantized, blocks, quality)
        (directory / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        _draw(directory / "report.png", blocks)
    finally:
        lock.release()
    for line in _summary(report):
        reporter.line(line)
    print(config.out)
    return 0


def choose_rows(store: "RowStore", count: int, seed: int, name: str) -> "dict[str, np.ndarray]":
    """Rows without padding, chosen at random."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(store))
    rows: list[dict[str, np.ndarray]] = []
    for i in order:
        row = store[int(i)]
        if row["segment_ids"].all():
            rows.append(row)
        if len(rows) == count:
            return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    raise ValueError(
        f"the {store.split} text has only {len(rows)} full rows of {store.seq_len} tokens; {name} is {count}: give "
        f"more text, shorter rows (--rows.seq-len), or a smaller --{name.replace('_', '-')}"
    )


def _bytes(tokenizer: Any, rows: "dict[str, np.ndarray]") -> int:
    """UTF-8 bytes of the text of the rows, special tokens left out."""
    return sum(len(tokenizer.decode(list(map(int, row))).encode()) for row in rows["tokens"])


def _report(
    config: Paroquant, params: Any, quantized: Any, blocks: "list[BlockReport]", quality: "dict[str, Quality]"
) -> dict[str, Any]:
    import jax

    def size(tree: Any) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    return {
        "command": command_line(),
        **machine(),
        "bytes": {"original": size(params), "quantized": size(quantized)},
        "quality": {name: own._asdict() for name, own in quality.items()},
        "blocks": [dataclasses.asdict(block) for block in blocks],
    }


def _summary(report: dict[str, Any]) -> list[str]:
    sizes, lines = report["bytes"], []
    lines.append(f"size  {sizes['original'] / 1e6:.1f} MB -> {sizes['quantized'] / 1e6:.1f} MB")
    for name, own in report["quality"].items():
        text = "" if own["nll"] is None else f"{own['nll']:.4f} nats/token  {own['bits_per_byte']:.4f} bits/byte  "
        lines.append(f"{name:10} {text}KL {own['kl']:.5f}  same next token {own['agreement']:.2%}")
    lines.append(f"held out: {report['quality']['original']['tokens']} tokens")
    return lines


def _draw(path: Path, blocks: "list[BlockReport]") -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    layers = [block.layer for block in blocks]
    lines = {"snr_nearest": "rounded to nearest", "snr": "ParoQuant", "snr_before": "errors of the blocks before alone"}
    for name, label in lines.items():
        values = [math.nan if getattr(block, name) is None else getattr(block, name) for block in blocks]
        left.plot(layers, values, marker="o", ms=3, label=label)
    left.set(xlabel="block", ylabel="SNR of the block's output (dB)", title="After each block")
    left.legend()
    for name in blocks[0].weight_snr:
        right.plot(layers, [block.weight_snr[name] for block in blocks], marker="o", ms=3, label=name)
    right.set(xlabel="block", ylabel="SNR of the weight (dB)", title="Linears")
    right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)
