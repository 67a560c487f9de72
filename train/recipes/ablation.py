"""Recipe `ablation`: conversions that differ in one choice each, over several seeds."""

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any, Literal

from train.config import to_json
from train.machine import command_line, machine
from train.recipes import demo
from train.recipes.demo import StageConfig
from train.recipes.quickstart import Quickstart

PROMPTS = "prompts.jsonl"
TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Which choices of the conversion matter: every arm differs from the default in one of them.

    python -m train ablation --directory runs/ablation

    Each seed trains an autoregressive model and converts it once per arm. A finished run is a file in runs/ of the
    directory and is not repeated; the same command continues. summary.md holds means with 95 % intervals over seeds
    and a verdict on each prediction, summary.json the same as data, beside pictures. To run on another machine make
    the data first (`--until store`), carry DIRECTORY/store there and give it with `--store`; that machine needs no
    tokeniser, completions are then judged when the command is repeated here.
    """

    directory: Path = Path("runs/ablation")
    """Everything goes here."""
    store: Path | None = None
    """Packed rows and prompts made elsewhere with `--until store`; None: made from the running interpreter's
    standard library."""
    ar: Path | None = None
    """A finished autoregressive model of the same sizes, the start of all seeds; None: each seed trains its own."""
    seeds: int = 3
    """Repetitions: other initial weights, other data order, other noise."""
    arms: tuple[str, ...] = ()
    """Only these, by name; none: all."""
    vocab_size: int = 1024
    dim: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    mlp_dim: int = 512
    """Head size is 64."""
    seq_len: int = 512
    """Tokens per row."""
    cuts: int = 8
    """How many times the corpus is cut into rows, each time at another offset."""
    batch_size: int = 16
    """Rows per update."""
    ar_steps: int = 2000
    """Updates of the autoregressive training; a conversion takes a fifth of them unless its arm says otherwise."""
    ar_learning_rate: float = 2e-3
    learning_rate: float = 1e-3
    """Of the conversions."""
    weight_decay: float = 0.1
    eval_rows: int = 128
    """Rows of test files that bounds are evaluated on; a multiple of 32, or fewer."""
    eval_samples: int = 2
    """Draws of the bound per row; the same ones for all runs."""
    prompts: int = 256
    """Held-out prompts that are completed; 0: bounds only."""
    prompt_tokens: int = 256
    """Longest prompt; a multiple of 32."""
    new_tokens: int = 128
    """Length of a completion."""
    limit_seconds: float | None = None
    """Start no further run after this time; the summary then says what is missing. None: no limit."""
    workers: int | None = None
    """Threads that compile; None: one per core, at most 16."""
    judge: bool = True
    """False: leave the completions to a later call; one core judges about 500 of them in a second."""
    until: Literal["store", "summary"] = "summary"

    def __post_init__(self):
        from train.ablation.arms import ARMS, BLOCKS

        names = [arm.name for arm in ARMS]
        if unknown := [name for name in self.arms if name not in names]:
            raise ValueError(f"arms must be among {', '.join(names)}; got {', '.join(unknown)}")
        for name in ("seeds", "eval_rows", "eval_samples", "new_tokens", "ar_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.prompts < 0:
            raise ValueError(f"prompts must not be negative; got {self.prompts}")
        largest = max(BLOCKS)
        for name in ("seq_len", "prompt_tokens"):
            if getattr(self, name) < 1 or getattr(self, name) % largest:
                raise ValueError(f"{name} must be a multiple of {largest}; got {getattr(self, name)}")
        if self.prompt_tokens + -(-self.new_tokens // largest) * largest > self.seq_len:
            raise ValueError(
                f"prompt_tokens + new_tokens must be at most seq_len = {self.seq_len}; got {self.prompt_tokens} + "
                f"{self.new_tokens}"
            )
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1 or None; got {self.workers}")

    def stage(self, steps: int, learning_rate: float) -> StageConfig:
        """One training run; a twentieth of it is warm-up."""
        return StageConfig(steps, self.batch_size, learning_rate, steps // 20, weight_decay=self.weight_decay)

    @property
    def identity(self) -> dict[str, Any]:
        """What runs of one directory have in common."""
        free = ("directory", "store", "seeds", "arms", "limit_seconds", "workers", "judge", "until")
        return {name: value for name, value in to_json(self).items() if name not in free}


def main(config: Ablation) -> int:
    """Runs what is left; 0 when all is there, 1 when the time limit left runs out."""
    from train.ablation.arms import ARMS
    from train.metrics import Reporter

    begun = time.perf_counter()
    report = Reporter()
    root = Path(config.directory)
    (root / "runs").mkdir(parents=True, exist_ok=True)
    _check_identity(root / "config.json", config)
    store = _store(config, root, report)
    if config.until == "store":
        print(store)
        return 0
    arms = [arm for arm in ARMS if not config.arms or arm.name in config.arms]
    missing = [
        (seed, arm) for arm in arms for seed in range(config.seeds) if not _run_file(root, seed, arm.name).is_file()
    ]
    left = _run(config, root, store, missing, begun, report) if missing else 0
    summarise(root, store, report, judge=config.judge)
    if left:
        report.line(f"{left} runs were not started within {config.limit_seconds:g} s; the same command continues")
    return 1 if left else 0


def _check_identity(path: Path, config: Ablation) -> None:
    mine = config.identity
    if path.is_file():
        theirs = json.loads(path.read_text("utf-8"))
        if changed := [name for name in mine if theirs.get(name) != mine[name]]:
            raise ValueError(
                f"{path.parent} holds runs with other settings ({', '.join(changed)}); give another directory"
            )
    else:
        _write_json(path, mine)


def _store(config: Ablation, root: Path, report: Any) -> Path:
    """The rows, with the prompts beside them."""
    from train.ablation.arms import BLOCKS
    from train.data.rows import RowStore

    if config.store is None:
        store = root / demo.STORE
        if not (store / PROMPTS).is_file():
            # Documents start at multiples of the largest block, so that no arm has short blocks.
            data = Quickstart(
                directory=root, vocab_size=config.vocab_size, seq_len=config.seq_len, block_size=max(BLOCKS),
                cuts=config.cuts, until="store",
            )  # fmt: skip
            demo.run(data, command_line())
            _add_prompts(config, root / "tokenizer", store)
    else:
        store = config.store
    rows = RowStore(store)
    if rows.seq_len != config.seq_len or rows.manifest["vocab_size"] != config.vocab_size:
        raise ValueError(
            f"store {store} has rows of {rows.seq_len} tokens of {rows.manifest['vocab_size']}; this run needs seq_len "
            f"{config.seq_len} and vocab_size {config.vocab_size}"
        )
    if not (store / PROMPTS).is_file():
        raise ValueError(f"store {store} has no {PROMPTS}; make it with `python -m train ablation --until store`")
    return store


def _add_prompts(config: Ablation, tokenizer: Path, store: Path) -> None:
    """Puts what completions need beside the rows; the prompts come last, their presence says that all is there."""
    from jaxmodels.demo.prompts import corpus_prompts, write_prompts
    from jaxmodels.tokenizer import Tokenizer
    from train.ablation.arms import BLOCKS

    shutil.copyfile(tokenizer / TOKENIZER_CONFIG, store / TOKENIZER_CONFIG)
    made = corpus_prompts(
        Tokenizer.from_directory(store), config.prompts, max_tokens=config.prompt_tokens, multiple=max(BLOCKS)
    )
    write_prompts(store / PROMPTS, made)


def _special_ids(store: Path) -> dict[str, int]:
    """Ids of "eos", "pad" and "mask", read without the library `tokenizers`."""
    added = json.loads((store / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    return {"eos": ids["<|endoftext|>"], "pad": ids["<|pad|>"], "mask": ids["<|mask|>"]}


def _bench(config: Ablation, store: Path) -> Any:
    from jaxmodels.demo.prompts import read_prompts
    from jaxmodels.layers.rope import RopeConfig
    from jaxmodels.qwen import QwenConfig, build
    from train.ablation.runs import Bench, Rows, Sizes
    from train.data.rows import RowStore

    special = _special_ids(store)
    lm = build(
        QwenConfig(
            vocab_size=config.vocab_size, dim=config.dim, layers=config.layers, heads=config.heads,
            kv_heads=config.kv_heads, head_dim=64, mlp_dim=config.mlp_dim, rope=RopeConfig(theta=10_000.0),
            qk_norm=True, tied_head=True, max_positions=config.seq_len, eos_ids=(special["eos"],),
            pad_id=special["pad"], mask_id=special["mask"],
        )
    )  # fmt: skip
    prompts = [prompt.ids for prompt in read_prompts(store / PROMPTS)]
    if len(prompts) < config.prompts:
        raise ValueError(f"prompts must be at most the {len(prompts)} of {store / PROMPTS}; got {config.prompts}")
    sizes = Sizes(
        batch_size=config.batch_size,
        ar_steps=config.ar_steps,
        ar_optim=config.stage(config.ar_steps, config.ar_learning_rate).optim,
        optim=lambda steps: config.stage(steps, config.learning_rate).optim,
        eval_samples=config.eval_samples,
        new_tokens=config.new_tokens,
    )
    held_out = Rows(RowStore(store, "test"), max_rows=config.eval_rows)
    workers = config.workers or min(16, os.cpu_count() or 1)
    return Bench(lm, sizes, Rows(RowStore(store)), held_out, prompts[: config.prompts], workers=workers)


def _run(config: Ablation, root: Path, store: Path, missing: list, begun: float, report: Any) -> int:
    """Does the missing runs, arm by arm; returns how many the time limit left undone."""
    import jax
    import numpy as np

    from train.ablation.runs import load_weights, save_weights
    from train.loop import TrainingError

    def out_of_time() -> bool:
        return config.limit_seconds is not None and time.perf_counter() - begun > config.limit_seconds

    if out_of_time():
        return len(missing)
    bench = _bench(config, store)
    shapes = jax.eval_shape(lambda: bench.lm.init(jax.random.key(0)))
    here = machine()
    report.line(f"{len(missing)} runs to do on {here['device']}; {len(bench.rows):,} rows to train on")
    weights: dict[int, Any] = {}
    failed = 0
    needs_ar = any(not (root / f"ar-{seed}.npz").is_file() for seed, _ in missing) and config.ar is None
    bench.prepare(list(dict.fromkeys(arm for _, arm in missing)), with_ar=needs_ar)
    try:
        for number, (seed, arm) in enumerate(missing):
            if out_of_time():
                return len(missing) - number
            if seed not in weights:
                path = root / f"ar-{seed}.npz"
                record: dict[str, Any] = {"seed": seed, "machine": here}
                before = time.perf_counter()
                if path.is_file():
                    weights[seed] = load_weights(path, shapes)
                elif config.ar is not None:
                    weights[seed] = _pretrained(config.ar, shapes)
                    record["from"] = str(config.ar)
                else:
                    weights[seed], trained = bench.train_ar(seed)
                    record |= trained
                    save_weights(path, weights[seed])
                if not (root / f"ar-{seed}.json").is_file():
                    record |= bench.ar_record(weights[seed])
                    record["seconds"] = round(time.perf_counter() - before, 2)
                    _write_json(root / f"ar-{seed}.json", record)
                    report.line(f"seed {seed}: autoregressive, {record['nats']:.4f} nats, {record['seconds']} s")
            try:
                values, tokens = bench.convert(arm, weights[seed], seed)
            except TrainingError as error:
                failed += 1
                report.line(f"seed {seed} {arm.name}: {error}; no record is written")
                continue
            if tokens:
                path = root / "runs" / f"tokens-{seed}-{arm.name}.npz"
                temporary = path.with_name(f".{path.name}.tmp.npz")
                np.savez_compressed(temporary, **tokens)
                temporary.replace(path)
            record = {"arm": arm.name, "seed": seed, "objective": to_json(arm.objective), "machine": here} | values
            _write_json(_run_file(root, seed, arm.name), record)
            bounds = " ".join(f"{block}:{value:.3f}" for block, value in values["bound"].items())
            report.line(
                f"[{number + 1}/{len(missing)}, {time.perf_counter() - begun:.0f} s] seed {seed} {arm.name}: "
                f"{bounds} | {' '.join(f'{k} {v:.1f} s' for k, v in values['seconds'].items())}"
            )
        return failed
    finally:
        bench.close()


def _pretrained(directory: Path, shapes: Any) -> Any:
    import jax

    from jaxmodels import load_pretrained

    params = load_pretrained(directory, dtype="float32").params
    wanted, given = (jax.tree.map(lambda x: x.shape, tree) for tree in (shapes, params))
    if wanted != given:
        raise ValueError(f"ar: {directory} holds a model of other sizes than dim, layers, heads, ... say")
    return params


def summarise(root: Path, store: Path, report: Any, *, judge: bool = True) -> None:
    """Judges completions (where that can be done here), and writes summary.json, summary.md and the pictures."""
    import numpy as np

    from train.ablation.arms import ARMS
    from train.ablation.pictures import draw
    from train.ablation.summary import judged, markdown, summarise

    order = [arm.name for arm in ARMS]
    records = [json.loads(path.read_text("utf-8")) for path in (root / "runs").glob("run-*.json")]
    records.sort(key=lambda record: (order.index(record["arm"]), record["seed"]))
    if not records:
        report.line("no run is finished: nothing to summarise")
        return
    judging = _judge(store, report) if judge and any(record["decode"] for record in records) else None
    for i, record in enumerate(records):
        name = f"{record['seed']}-{record['arm']}"
        path = root / "runs" / f"judged-{name}.json"
        if path.is_file():
            records[i] = json.loads(path.read_text("utf-8"))
        elif record["decode"] and judging is not None:
            with np.load(root / "runs" / f"tokens-{name}.npz") as tokens:
                records[i] = judged(record, tokens, judging)
            _write_json(path, records[i])
    ar = [json.loads(path.read_text("utf-8")) for path in sorted(root.glob("ar-*.json"))]
    about = json.loads((root / "config.json").read_text("utf-8"))
    about["machines"] = sorted({json.dumps(record["machine"]) for record in records})
    about["command"] = command_line()
    summary = summarise(records, {record["seed"]: record["nats"] for record in ar}, about)
    _write_json(root / "summary.json", summary)
    text = markdown(summary)
    (root / "summary.md").write_text(text, "utf-8")
    draw(summary, root)
    print(text)


def _judge(store: Path, report: Any) -> Any:
    """Function from token ids of all prompts' completions to the shares that parse and that are valid."""
    try:
        from jaxmodels.tokenizer import Tokenizer
    except ModuleNotFoundError as error:
        report.line(f"completions are not judged here ({error}); repeat the command where the library is installed")
        return None
    from jaxmodels.demo.completions import MIN_STATEMENTS, parse_completion
    from jaxmodels.demo.prompts import read_prompts

    tokenizer = Tokenizer.from_directory(store)
    prompts = read_prompts(store / PROMPTS)
    eos = tokenizer.token_id(tokenizer.special_tokens["eos_token"])

    def judge(tokens: Any) -> dict[str, float]:
        found = []
        for prompt, row in zip(prompts, tokens, strict=False):  # a run may take the first prompts only
            ids = [int(token) for token in row if token >= 0]
            ended = bool(ids) and ids[-1] == eos
            found.append(parse_completion(prompt.cut.context, tokenizer.decode(ids), ended=ended))
        return {
            "parses": sum(p.parses for p in found) / len(found),
            "valid": sum(p.statements >= MIN_STATEMENTS for p in found) / len(found),
        }

    return judge


def _run_file(root: Path, seed: int, arm: str) -> Path:
    return root / "runs" / f"run-{seed}-{arm}.json"


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
    temporary.replace(path)
