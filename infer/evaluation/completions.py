"""Task `completions`: an AR and a block-diffusion model complete the same held-out Python code.

Both models get the same prompts: places in test files of the demonstration corpus where a statement ends.
`jaxmodels.demo.completions` says what counts as valid. Three steps, each skipped when its files are there:

    prompts.jsonl            the prompts
    tokens-<arm>.jsonl       what each arm generated, with its forward passes
    results.json             judgement of all arms, with intervals

They may run on different machines: `--no-judge` generates only, and a directory that already holds the first
two is only judged. Prompts and judgement need the standard library that the corpus names; generation does not.
"""

import dataclasses
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # `--help` imports this module
    from jaxmodels.decoding.complete import Completion

ASSETS = Path(__file__).parents[1] / "assets"


@dataclasses.dataclass(frozen=True)
class Completions:
    """Compare an AR and a block-diffusion model on completions of held-out Python code.

    python -m infer completions --output runs/completions
    """

    ar: Path = ASSETS / "ar"
    """Autoregressive model."""
    dlm: Path = ASSETS / "dlm"
    """Block-diffusion model made from it."""
    output: Path = Path("runs/completions")
    """Prompts, generated tokens and results; what is there already is not made again."""
    count: int = 2048
    """Prompts."""
    split: Literal["validation", "test"] = "test"
    """Files that the prompts come from; choose settings on the validation files."""
    prompt_tokens: int = 256
    new_tokens: int = 128
    thresholds: tuple[float, ...] = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
    """Confidence thresholds; one token per step is always among the arms."""
    factors: tuple[float, ...] = ()
    """Factors of the rule that reveals n tokens while (n + 1) (1 - n-th confidence) stays below it."""
    budgets: tuple[float, ...] = ()
    """Budgets of the rule that reveals tokens while the sum of their (1 - confidence) stays below it."""
    lookahead: int | None = None
    """These rules reveal only among this many masked tokens, the first of the block; None: among all."""
    block_length: int | None = None
    """Tokens decoded together; None: the training block."""
    temperature: float = 0.0
    batch: int | None = None
    """Rows generated together; None: 256 on a GPU, 16 on a CPU."""
    seed: int = 0
    judge: bool = True
    """False: only generate."""

    def __post_init__(self):
        for name in ("count", "prompt_tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch must be positive; got {self.batch}")
        if self.lookahead is not None and self.lookahead < 1:
            raise ValueError(f"lookahead must be positive; got {self.lookahead}")
        if any(not 0.0 <= t <= 1.0 for t in self.thresholds):
            raise ValueError(f"thresholds must lie in [0, 1]; got {self.thresholds}")
        for name in ("factors", "budgets"):
            if any(not value > 0.0 for value in getattr(self, name)):
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")


def main(config: Completions) -> int:
    """Runs the task; results go to the output directory and as a table to stdout."""
    import rich.console

    from jaxmodels import load_pretrained
    from jaxmodels.demo.prompts import corpus_prompts, read_prompts, write_prompts
    from jaxmodels.tokenizer import Tokenizer

    log = rich.console.Console(stderr=True)
    config.output.mkdir(parents=True, exist_ok=True)
    _check_identity(config)
    tokenizer = Tokenizer.from_directory(config.dlm)
    path = config.output / "prompts.jsonl"
    if not path.is_file():
        block = _block_size(config.dlm)
        made = corpus_prompts(
            tokenizer, config.count, max_tokens=config.prompt_tokens, multiple=block, seed=config.seed,
            split=config.split,
        )  # fmt: skip
        write_prompts(path, made)
    prompts = read_prompts(path)
    ids = [prompt.ids for prompt in prompts]
    generated = {}
    models: dict[str, Any] = {}
    for arm, (kind, rule) in arms(config).items():
        file = config.output / f"tokens-{arm}.jsonl"
        if not file.is_file():
            if kind not in models:
                models[kind] = load_pretrained(config.ar if kind == "ar" else config.dlm)
            before = time.perf_counter()
            if kind == "ar":
                done = generate_ar(models[kind], ids, config)
            else:
                done = generate_dlm(models[kind], ids, config, **rule)
            seconds = time.perf_counter() - before
            _write(file, done)
            tokens = sum(len(c.tokens) for c in done)
            log.print(f"{arm}: {tokens:,} tokens in {seconds:.1f} s, compilation included")
        generated[arm] = _read(file)
        if len(generated[arm]) != len(prompts):
            raise ValueError(f"{file} has {len(generated[arm])} completions for {len(prompts)} prompts; delete it")
    if not config.judge:
        print(config.output)
        return 0
    results = judge(prompts, generated, tokenizer, config.new_tokens)
    (config.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    rich.console.Console().print(results_table(results))
    return 0


def arms(config: Completions) -> dict[str, tuple[str, dict[str, float]]]:
    """name -> (kind, rule of `RevealOptions`): the AR model, one token per step, thresholds, factors, budgets."""
    near: dict[str, float] = {} if config.lookahead is None else {"lookahead": config.lookahead}
    ending = "" if config.lookahead is None else f"-lookahead-{config.lookahead}"
    rules: dict[str, tuple[str, dict[str, float]]] = {"ar": ("ar", {}), "dlm-one": ("dlm", {})}
    for name, label, values in (
        ("threshold", "", config.thresholds),
        ("factor", "factor-", config.factors),
        ("budget", "budget-", config.budgets),
    ):
        rules |= {f"dlm-{label}{value:g}{ending}": ("dlm", {name: value} | near) for value in values}
    return rules


def generate_ar(model: Any, prompts: Sequence[Sequence[int]], config: Completions) -> "list[Completion]":
    """Completions of the AR model."""
    from jaxmodels.decoding.complete import complete_autoregressive

    return complete_autoregressive(model.lm, model.params, prompts, **_options(config, len(prompts)))


def generate_dlm(model: Any, prompts: Sequence[Sequence[int]], config: Completions, **rule: Any) -> "list[Completion]":
    """Completions of the block-diffusion model by a rule of `RevealOptions` (none: one token per step)."""
    from jaxmodels.decoding.block_diffusion import RevealOptions
    from jaxmodels.decoding.complete import complete_blocks

    return complete_blocks(
        model.lm, model.params, prompts, reveal=RevealOptions(**rule), block_length=config.block_length,
        **_options(config, len(prompts)),
    )  # fmt: skip


def judge(
    prompts: Sequence[Any], generated: "dict[str, list[Completion]]", tokenizer: Any, new_tokens: int
) -> dict[str, Any]:
    """Validity, copies and tokens per forward pass of every arm, and differences to the first two arms.

    The arm "file" is the files' own continuation of the same length: what a perfect model would reach.

    Args:
        prompts: from `corpus_prompts`.
        generated: completions of the same prompts per arm, the first two being references.
        tokenizer: of the models; encodes the corpus for the search for copies.
        new_tokens: longest completion.

    Returns:
        JSON-able: "arms" (name -> numbers), "prompts", "files", "definition".
    """
    import numpy as np

    from jaxmodels.demo.completions import (
        MAX_COPIED,
        MIN_STATEMENTS,
        longest_matches,
        mean_interval,
        normalise,
        paired_difference,
        parse_completion,
        wilson_interval,
    )
    from jaxmodels.demo.corpus import load_corpus

    special = tokenizer.special_ids
    texts: dict[str, list[tuple[str, bool]]] = {}
    for arm, completions in generated.items():
        texts[arm] = [(tokenizer.decode(c.tokens), bool(c.tokens) and c.tokens[-1] in special) for c in completions]
    texts["file"] = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt.following, add_special_tokens=False)[:new_tokens]
        texts["file"].append((tokenizer.decode(ids), False))
    parsed = {
        arm: [
            parse_completion(prompt.cut.context, text, ended=ended)
            for prompt, (text, ended) in zip(prompts, own, strict=True)
        ]
        for arm, own in texts.items()
    }

    encode = tokenizer.backend.encode_batch_fast
    training = [normalise(text) for text in load_corpus().split("train").values()]
    separator = tokenizer.vocab_size  # stands in no completion
    corpus = np.concatenate([np.asarray([*e.ids, separator]) for e in encode(training)])
    places = [(arm, i) for arm, own in parsed.items() for i, p in enumerate(own) if p.statements >= MIN_STATEMENTS]
    queries = [np.asarray(e.ids) for e in encode([normalise(parsed[arm][i].text) for arm, i in places])]
    matches = longest_matches(queries, corpus)
    copied = {arm: np.zeros(len(prompts)) for arm in parsed}
    for (arm, i), match, query in zip(places, matches, queries, strict=True):
        copied[arm][i] = match / max(len(query), 1)

    files = [prompt.cut.path for prompt in prompts]
    results: dict[str, Any] = {}
    valid = {}
    for arm, own in parsed.items():
        enough = np.array([p.statements >= MIN_STATEMENTS for p in own])
        valid[arm] = enough & (copied[arm] < MAX_COPIED)
        total = int(valid[arm].sum())
        # Prompts of one file are alike: the interval over files is the honest one, Wilson's the usual one.
        mean, low, high = mean_interval(valid[arm].astype(float), files)
        results[arm] = {
            "valid": mean,
            "valid_interval": [low, high],
            "valid_wilson": list(wilson_interval(total, len(own))),
            "parses": float(np.mean([p.parses for p in own])),
            "enough_statements": float(enough.mean()),
            "copied": float((enough & (copied[arm] >= MAX_COPIED)).mean()),
            "distinct": float(np.mean([p.distinct for p in own if p.statements >= MIN_STATEMENTS]))
            if enough.any()
            else None,
        }
        if arm in generated:
            tokens = np.array([len(c.tokens) for c in generated[arm]])
            forwards = np.array([c.forwards for c in generated[arm]])
            results[arm]["tokens_per_forward"] = float(tokens.sum() / forwards.sum())
            results[arm]["forwards_per_completion"] = float(forwards.mean())
            results[arm]["tokens_per_completion"] = float(tokens.mean())
    for reference in list(generated)[:2]:
        for arm in generated:
            if arm != reference:
                mean, low, high = paired_difference(valid[reference], valid[arm], files)
                results[arm][f"valid_minus_{reference}"] = [mean, low, high]
    definition = (
        f"parses after its context when cut to its last complete statement, at least {MIN_STATEMENTS} new statements, "
        f"longest match with the training files below {MAX_COPIED:.0%} of its tokens; "
        "intervals: 95 %, bootstrap over files"
    )
    return {"prompts": len(prompts), "files": len(set(files)), "definition": definition, "arms": results}


def results_table(results: dict[str, Any]) -> Any:
    """The judgement as a table for terminals."""
    import rich.table

    title = f"{results['prompts']} prompts from {results['files']} held-out files"
    table = rich.table.Table(
        "arm", "tokens/forward", "valid", "− AR (points)", "parses", "copied", "distinct", title=title
    )
    for arm, r in results["arms"].items():
        low, high = r["valid_interval"]
        difference = r.get("valid_minus_ar")
        table.add_row(
            arm,
            f"{r['tokens_per_forward']:.2f}" if "tokens_per_forward" in r else "",
            f"{r['valid']:.1%} [{low:.1%}, {high:.1%}]",
            "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in difference)) if difference else "",
            f"{r['parses']:.1%}",
            f"{r['copied']:.1%}",
            "" if r["distinct"] is None else f"{r['distinct']:.0%}",
        )
    return table


def _options(config: Completions, prompts: int) -> dict[str, Any]:
    import jax

    default = 16 if jax.default_backend() == "cpu" else 256
    return {
        "max_new_tokens": config.new_tokens,
        "batch": min(config.batch or default, prompts),
        "temperature": config.temperature,
        "seed": config.seed,
    }


def _block_size(directory: Path) -> int:
    from jaxmodels.checkpoints.huggingface import read_json

    size = read_json(directory / "config.json").get("block_size")
    if not isinstance(size, int):
        raise ValueError(f"{directory}: config.json has no block_size; dlm must be a block-diffusion model")
    return size


def _check_identity(config: Completions) -> None:
    """One output directory, one setting."""
    path = config.output / "config.json"
    kept = ("ar", "dlm", "count", "split", "prompt_tokens", "new_tokens", "block_length", "temperature", "seed")
    mine = {name: str(getattr(config, name)) for name in kept}
    if path.is_file():
        theirs = json.loads(path.read_text("utf-8"))
        # Models may move between machines; their names must agree.
        for values in (mine, theirs):
            values["ar"], values["dlm"] = Path(values["ar"]).name, Path(values["dlm"]).name
        changed = [name for name in kept if theirs.get(name) != mine[name]]
        if changed:
            raise ValueError(f"{config.output} was made with another {changed[0]}; give another --output")
    else:
        path.write_text(json.dumps(mine, indent=1) + "\n", "utf-8")


def _write(path: Path, completions: "Iterable[Completion]") -> None:
    text = "".join(json.dumps({"tokens": c.tokens, "forwards": c.forwards}) + "\n" for c in completions)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)


def _read(path: Path) -> "list[Completion]":
    from jaxmodels.decoding.complete import Completion

    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [Completion(tuple(r["tokens"]), r["forwards"]) for r in records]
