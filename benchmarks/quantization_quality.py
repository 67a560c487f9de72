"""What 4-bit weights cost the shipped autoregressive model: bits per byte and valid completions, by method.

    python -m benchmarks.quantization_quality --output runs/quantization

Arms: the model itself; int4, int8, fp8 and nvfp4 rounded to nearest; int4 under activation-aware scales (AWQ's idea,
without its clipping); and ParoQuant. The last two see calibration text, and so are made once per seed. Calibration rows
are training files, the best epoch is chosen on validation files, everything reported is measured on test files.
Differences are paired: by row of text for bits per byte, by file for completions. What is there already is not made
again.
"""

import argparse
import dataclasses
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infer.evaluation.completions import judge
from jaxmodels import load_pretrained, save_pretrained
from jaxmodels.decoding.complete import complete_autoregressive
from jaxmodels.demo.corpus import load_corpus
from jaxmodels.demo.prompts import corpus_prompts
from jaxmodels.quantization import round_params
from pallas_kernels.quantized_matmul import QuantizedTensor, dequantize
from train.config import MeshConfig
from train.data import RowStore, StoreConfig
from train.data.corpus import open_or_build_corpus
from train.machine import command_line, machine
from train.mesh import make_mesh
from train.paroquant.config import ParoquantConfig
from train.paroquant.quality import row_sums
from train.paroquant.scaling import scale_model
from train.paroquant.whole import quantize_model
from train.recipes.paroquant import choose_rows

MODEL = Path("infer/assets/ar")
SEQ_LEN, GROUP = 256, 128
PROMPT_TOKENS, NEW_TOKENS = 256, 128
BOOTSTRAPS = 10_000


def dense(params: Any) -> Any:
    """Quantized weights written out, which gives the same results and decodes faster on a CPU."""

    @functools.partial(jax.jit)
    def one(weight: QuantizedTensor) -> jax.Array:
        return jax.lax.map(lambda layer: dequantize(weight.of_layer(layer)), jnp.arange(len(weight.codes)))

    return jax.tree.map(
        lambda leaf: one(leaf) if isinstance(leaf, QuantizedTensor) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor),
    )


def measure(lm: Any, original: Any, own: Any, rows: dict[str, np.ndarray]) -> np.ndarray:
    """Per row: nats, divergence, agreeing tokens, predicted tokens, tokens; `[S, 5]`."""
    return np.stack(
        [
            row_sums(lm, original, own, {name: x[i : i + 1] for name, x in rows.items()})
            for i in range(len(rows["tokens"]))
        ]
    )


def interval(values: np.ndarray, weights: np.ndarray) -> list[float]:
    """Ratio of sums, and its 95 % interval from a bootstrap over rows."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(values), (BOOTSTRAPS, len(values)))
    ratios = values[picks].sum(axis=1) / weights[picks].sum(axis=1)
    return [float(values.sum() / weights.sum()), *map(float, np.quantile(ratios, [0.025, 0.975]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/quantization"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=512, help="calibration rows")
    parser.add_argument("--epochs", type=int, nargs=2, default=[5, 5])
    parser.add_argument("--test-rows", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    model = load_pretrained(MODEL)
    lm, tokenizer = model.lm, model.tokenizer
    assert tokenizer is not None
    params = jax.tree.map(lambda x: x.astype(jnp.float32), model.params)
    corpus = load_corpus()
    settings = StoreConfig(SEQ_LEN, lm.config.eos_ids[0])
    store = open_or_build_corpus(args.output / "rows", corpus, tokenizer.backend, settings)
    test = choose_rows(RowStore(store, "test"), args.test_rows, 0, "rows")
    validation = choose_rows(RowStore(store, "validation"), 64, 0, "rows")

    makers: dict[str, Any] = {"dense": lambda: params}
    for name, options in {
        "int4": dict(format="int4", group_size=GROUP), "int8": dict(format="int8"), "fp8": dict(format="fp8"),
        "nvfp4": dict(format="nvfp4"),
    }.items():  # fmt: skip
        makers[name] = functools.partial(round_params, lm, params, **options)
    seconds: dict[str, float] = {}
    for seed in args.seeds:
        rows = choose_rows(RowStore(store, "train"), args.samples, seed, "rows")

        def scaled(rows=rows):
            return scale_model(lm, params, {k: v[:128] for k, v in rows.items()}, group_size=GROUP)[0]

        def paroquant(rows=rows, seed=seed):
            config = ParoquantConfig(group_size=GROUP, epochs=tuple(args.epochs), seed=seed)
            directory = args.output / f"paroquant-{seed}"
            mesh = make_mesh(MeshConfig())
            start = time.perf_counter()
            done = quantize_model(
                lm, params, rows, validation, config, directory=directory, mesh=mesh, dtype=jnp.dtype("float32"),
                report=lambda line: print(f"seed {seed}  {line}", flush=True),
            )[0]  # fmt: skip
            seconds[f"paroquant-{seed}"] = time.perf_counter() - start
            return done

        makers[f"scaled-{seed}"], makers[f"paroquant-{seed}"] = scaled, paroquant

    prompts = corpus_prompts(tokenizer, args.prompts, max_tokens=PROMPT_TOKENS, multiple=1, seed=0, split="test")
    ids = [prompt.ids for prompt in prompts]
    sums, generated = {}, {}
    for name, make in makers.items():
        file = args.output / f"{name}.npz"
        if not file.is_file():
            own = make()
            if name.startswith("paroquant"):
                save_pretrained(args.output / f"model-{name}", lm, own, tokenizer=tokenizer)
            own = dense(own)
            found = measure(lm, params, own, test)
            done = complete_autoregressive(lm, own, ids, max_new_tokens=NEW_TOKENS, batch=args.batch)
            tokens = np.full((len(done), NEW_TOKENS), -1, np.int32)
            for row, completion in zip(tokens, done, strict=True):
                row[: len(completion.tokens)] = completion.tokens
            np.savez(file, sums=found, tokens=tokens)
            print(f"{name}: {found[:, 0].sum() / found[:, 3].sum():.4f} nats/token", flush=True)
        stored = np.load(file)
        sums[name] = stored["sums"]
        generated[name] = [
            dataclasses.replace(_completion(row[row >= 0]), forwards=int((row >= 0).sum())) for row in stored["tokens"]
        ]

    num_bytes = np.array([len(tokenizer.decode(list(map(int, row))).encode()) for row in test["tokens"]])
    judged = judge(prompts, generated, tokenizer, NEW_TOKENS)
    arms = {}
    for name, own in sums.items():
        bits = own[:, 0] / math.log(2)
        arms[name] = {
            "bits_per_byte": interval(bits, num_bytes),
            "bits_per_byte_minus_dense": interval(bits - sums["dense"][:, 0] / math.log(2), num_bytes),
            "bits_per_byte_minus_int4": interval(bits - sums["int4"][:, 0] / math.log(2), num_bytes),
            "kl": interval(own[:, 1], own[:, 4]),
            "agreement": interval(own[:, 2], own[:, 4]),
            "completions": judged["arms"][name],
            "seconds": seconds.get(name),
        }
        print(name, {k: arms[name][k] for k in ("bits_per_byte", "bits_per_byte_minus_dense", "kl")}, flush=True)
    result = {
        "command": command_line(), **machine(), "settings": {k: str(v) for k, v in vars(args).items()},
        "group_size": GROUP, "test_tokens": int(sums["dense"][:, 4].sum()), "test_bytes": int(num_bytes.sum()),
        "prompts": judged["prompts"], "definition": judged["definition"], "file": judged["arms"]["file"], "arms": arms,
    }  # fmt: skip
    (args.output / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, args.output / "results.png")
    print(args.output / "results.json")


def draw(result: dict[str, Any], path: Path) -> None:
    """What every arm adds to the bits per byte of the model itself, with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = {name: arm["bits_per_byte_minus_dense"] for name, arm in result["arms"].items() if name != "dense"}
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for place, (mean, low, high) in enumerate(arms.values()):
        axis.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", capsize=3)
    axis.set_yticks(range(len(arms)), list(arms))
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(xlabel="bits per byte added, test files (95 % interval)", xlim=(-0.0005, None))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _completion(tokens: np.ndarray) -> Any:
    from jaxmodels.decoding.complete import Completion

    return Completion(tuple(map(int, tokens)), 0)


if __name__ == "__main__":
    main()
