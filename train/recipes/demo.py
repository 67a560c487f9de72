"""The chain behind `quickstart` and `shipped`: corpus, tokeniser, AR training, conversion, distillation, evaluation.

Each stage writes what the next one needs below `directory` and is skipped when it is there already, so the
same command continues after a kill:

    store/       the corpus as packed rows, and its tokeniser
    ar-run/      the autoregressive run (checkpoints, metrics); ar/ is the model it gives
    dlm-run/     the conversion; dlm/ is the model it gives
    distilled-run/  completions of dlm/ and the run that learns them; distilled/ is the model it gives
    record.json  configuration, hardware, versions, times and metrics of all stages
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from train.config import MeshConfig, OptimConfig, RunConfig, to_json
from train.machine import machine
from train.objectives.config import DiffusionObjective

if TYPE_CHECKING:  # importing a recipe must stay quick: `--help` imports it
    from jaxmodels.qwen import CausalLM, QwenConfig
    from train.data.batches import Rows

# Data and weights of one stage go by these names below the directory.
STORE, AR, DLM, DISTILLED = "store", "ar", "dlm", "distilled"
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One training run of the chain."""

    steps: int
    """Updates."""
    batch_size: int
    """Rows per update."""
    learning_rate: float
    """Peak of the cosine schedule, which ends at a twentieth of it."""
    warmup_steps: int
    weight_decay: float = 0.1
    eval_every: int = 0
    """Steps between two evaluations on validation files, of which the best weights are kept; 0: only the last
    weights count."""

    def __post_init__(self):
        for name in ("steps", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(f"warmup_steps must lie in [0, steps={self.steps}); got {self.warmup_steps}")

    def run(self, directory: Path, seed: int) -> RunConfig:
        return RunConfig(
            directory=directory,
            steps=self.steps,
            batch_size=self.batch_size,
            seed=seed,
            log_every=max(1, min(50, self.steps // 20)),
            eval_every=self.eval_every,
            eval_batches=64,
            checkpoint_every=max(50, self.steps // 4),
            keep=1,
        )

    @property
    def optim(self) -> OptimConfig:
        return OptimConfig(
            learning_rate=self.learning_rate,
            final_learning_rate=self.learning_rate / 20,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            beta2=0.98,
        )


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """How the converted model learns its own completions, see `train.recipes.distill`."""

    prompts: int
    """Places in training files that the teacher completes; where there are fewer, they are used again with prompts of
    other lengths, and prompts that come out equal are completed once."""
    stage: StageConfig
    """The training run of one round."""
    rounds: int = 1
    """How often the model completes the prompts and learns what was accepted; 0: the converted model is the last."""
    threshold: float = 0.95
    """Confidence at which the model decodes what it then learns."""
    shortest_prompt: int = 64
    longest_prompt: int = 384
    """Tokens; lengths are drawn from multiples of the block size between the two."""
    new_tokens: int = 128
    """Tokens per completion."""
    min_distinct: float = 0.5
    """Completions whose statements repeat more than this allows are not learnt."""
    share: float = 0.6
    """Of the rows of each batch; the others are text of the corpus."""

    def __post_init__(self):
        for name in ("prompts", "shortest_prompt", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.rounds < 0:
            raise ValueError(f"rounds must not be negative; got {self.rounds}")
        if self.longest_prompt < self.shortest_prompt:
            raise ValueError(
                f"longest_prompt must be at least shortest_prompt = {self.shortest_prompt}; got {self.longest_prompt}"
            )
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"threshold must lie in [0, 1]; got {self.threshold}")
        if not 0.0 < self.share < 1.0:
            raise ValueError(f"share must lie in (0, 1); got {self.share}")
        if not 0.0 <= self.min_distinct <= 1.0:
            raise ValueError(f"min_distinct must lie in [0, 1]; got {self.min_distinct}")


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """What decides the models of the chain."""

    directory: Path
    """Everything goes here; the same command with the same directory continues."""
    store: Path | None
    """Packed rows made elsewhere with `--until store`; None: made from the running interpreter's library."""
    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    mlp_dim: int
    """Head size is 64."""
    seq_len: int
    """Tokens per row."""
    block_size: int
    """Tokens that the diffusion model denoises together."""
    half_life_ratio: float
    """lambda of position-dependent masking."""
    input_dropout: float
    """Share of the AR model's input tokens replaced by the mask token: noise against learning a small corpus
    by heart, and a first acquaintance with the mask."""
    cuts: int
    """How many times the corpus is cut into rows, each time at another offset."""
    ar: StageConfig
    dlm: StageConfig
    distill: DistillConfig
    completions: int
    """Held-out prompts completed for the evaluation at the end; 0: bounds only."""
    seed: int
    until: Literal["store", "ar", "dlm", "distilled", "evaluation"]
    """Stop after this stage. A store, which holds its tokeniser, or a directory with finished stages can be
    carried to another machine."""
    measure: bool
    """Only time some steps of both stages on this machine, and say how long they would take."""
    eval_rows: int
    """Rows of test files that bounds are evaluated on."""

    def __post_init__(self):
        if self.seq_len % self.block_size:
            raise ValueError(f"block_size must divide seq_len = {self.seq_len}; got {self.block_size}")
        if not 0.0 <= self.input_dropout < 1.0:
            raise ValueError(f"input_dropout must lie in [0, 1); got {self.input_dropout}")
        if self.completions < 0:
            raise ValueError(f"completions must not be negative; got {self.completions}")
        if self.distill.rounds:
            needed = self.distill.longest_prompt + self.distill.new_tokens
            if needed > self.seq_len:
                raise ValueError(
                    f"distill.longest_prompt and distill.new_tokens need {needed} tokens; a row has {self.seq_len}"
                )

    @property
    def objective(self) -> DiffusionObjective:
        """Of the conversion: clean context and position-dependent masking."""
        return DiffusionObjective(block_size=self.block_size, half_life_ratio=self.half_life_ratio)

    def model(self, special: dict[str, int], *, diffusion: bool) -> "QwenConfig":
        """Qwen3's structure with a tied head."""
        from jaxmodels.layers.rope import RopeConfig
        from jaxmodels.qwen import QwenConfig

        return QwenConfig(
            vocab_size=self.vocab_size,
            dim=self.dim,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=64,
            mlp_dim=self.mlp_dim,
            rope=RopeConfig(theta=10_000.0),
            qk_norm=True,
            tied_head=True,
            max_positions=self.seq_len,
            eos_ids=(special["eos"],),
            pad_id=special["pad"],
            mask_id=special["mask"],
            block_size=self.block_size if diffusion else None,
        )


def run(config: DemoConfig, command: str) -> int:
    """Runs what is left of the chain; 0 when all is there, 1 when it was interrupted."""
    from train.metrics import Reporter

    report = Reporter()
    root = Path(config.directory)
    root.mkdir(parents=True, exist_ok=True)
    record = _Record(root / "record.json", config, command)
    store = _prepared(config, root, report, record)
    if config.until == "store":
        print(store)
        return 0
    chain = _Chain(config, root, store, report, record)
    if config.measure:
        chain.measure()
        return 0
    stages = [("ar", chain.train_ar), ("dlm", chain.convert)]
    if config.distill.rounds:
        stages.append(("distilled", chain.distill))
    for name, stage in [*stages, ("evaluation", chain.evaluate)]:
        if not stage():
            return 1
        if name == config.until:
            break
    print(root)
    return 0


class _Record:
    """record.json: what a stranger needs to repeat or judge the run; rewritten whole after each stage."""

    def __init__(self, path: Path, config: DemoConfig, command: str):
        self.path = path
        identity = {
            k: v
            for k, v in to_json(config).items()
            if k not in ("directory", "until", "measure", "completions", "eval_rows", "store")
        }
        if path.is_file():
            self.values = json.loads(path.read_text("utf-8"))
            if self.values["config"] != identity:
                changed = [k for k in identity if self.values["config"].get(k) != identity[k]]
                raise ValueError(
                    f"{path.parent} holds a run with other settings ({', '.join(changed)}); give another directory"
                )
        else:
            self.values = {"config": identity, "commands": [], "stages": {}}
        if command not in self.values["commands"]:
            self.values["commands"].append(command)
        self.write()

    def stage(self, name: str, values: dict[str, Any]) -> None:
        self.values["stages"][name] = values | machine()
        self.write()

    def write(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.values, indent=1) + "\n", "utf-8")
        temporary.replace(self.path)


def _prepared(config: DemoConfig, root: Path, report: Any, record: _Record) -> Path:
    """The row store: the given one, or made from the standard library."""
    from train.data.rows import RowStore, StoreConfig

    if config.store is not None:
        rows = RowStore(config.store)
        if rows.seq_len != config.seq_len or rows.manifest["vocab_size"] != config.vocab_size:
            raise ValueError(
                f"store {config.store} has rows of {rows.seq_len} tokens of {rows.manifest['vocab_size']}; "
                f"this run needs seq_len {config.seq_len} and vocab_size {config.vocab_size}"
            )
        return config.store

    from jaxmodels.demo.corpus import PYTHON_VERSION, load_corpus
    from train.data.corpus import corpus_digest, open_or_build_corpus
    from train.data.tokenizer import save_tokenizer, special_ids, train_tokenizer

    before = time.perf_counter()
    corpus = load_corpus()
    report.line(
        f"corpus: {len(corpus.texts)} files of the standard library, "
        f"{sum(map(len, corpus.texts.values())) / 1e6:.1f} MB"
    )
    directory = root / STORE
    path = root / "tokenizer"
    if (path / "tokenizer.json").is_file():
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(corpus.split("train").values(), config.vocab_size)
        save_tokenizer(path, tokenizer, max_positions=config.seq_len)
    settings = StoreConfig(config.seq_len, special_ids(tokenizer)["eos"], align=config.block_size, cuts=config.cuts)
    open_or_build_corpus(directory, corpus, tokenizer, settings)
    sizes = RowStore(directory).manifest["splits"]
    report.line("tokens: " + ", ".join(f"{name} {sizes[name]['tokens']:,}" for name in SPLITS))
    if "store" not in record.values["stages"]:
        record.stage(
            "store",
            {
                "seconds": round(time.perf_counter() - before, 1),
                "python_of_the_list": PYTHON_VERSION,
                "files_changed": len(corpus.changed),
                "files_missing": len(corpus.missing),
                "list_sha256": corpus_digest(),
                "fingerprint": RowStore(directory).fingerprint,
                "tokens": {name: sizes[name]["tokens"] for name in SPLITS},
            },
        )
    return directory


class _Chain:
    """The stages after the data."""

    def __init__(self, config: DemoConfig, root: Path, store: Path, report: Any, record: _Record):
        import tokenizers

        from jaxmodels.qwen import build
        from jaxmodels.tokenizer import Tokenizer
        from train.data.rows import RowStore
        from train.data.tokenizer import EOS, MASK, PAD, special_ids
        from train.mesh import make_mesh

        self.config, self.root, self.report, self.record = config, root, report, record
        self.rows = {name: RowStore(store, name) for name in SPLITS}
        backend = tokenizers.Tokenizer.from_file(str(store / "tokenizer.json"))
        special = special_ids(backend)
        self.tokenizer = Tokenizer(
            backend,
            config={
                "eos_token": EOS, "pad_token": PAD, "mask_token": MASK, "bos_token": None, "add_bos_token": False,
                "clean_up_tokenization_spaces": False, "model_max_length": config.seq_len,
            },
        )  # fmt: skip
        self.ar = build(config.model(special, diffusion=False))
        self.dlm = build(config.model(special, diffusion=True))
        self.mesh = make_mesh(MeshConfig())

    # -- training
    # -------------------------------------------------------------------------------------------------

    def train_ar(self) -> bool:
        """Trains the autoregressive model; False if interrupted."""

        def held_out(params: Any) -> float:
            return self.ar_nats(params, "validation")

        return self._fit(AR, self.ar, self.config.ar, None, *self._ar_losses(), held_out)

    def convert(self) -> bool:
        """Converts it into a block-diffusion model; False if interrupted."""
        from jaxmodels import load_pretrained

        start = load_pretrained(self.root / AR, dtype="float32").params
        loss = self._conversion_loss()

        def held_out(params: Any) -> float:
            return self.bound_nats(params, "validation", self.config.block_size, samples=2)[0]

        return self._fit(DLM, self.dlm, self.config.dlm, lambda: start, loss, loss, held_out)

    def distill(self) -> bool:
        """Lets the converted model learn those of its own completions that are good; False if interrupted."""
        from jaxmodels import load_pretrained
        from train.data.pairs import Mixture
        from train.objectives.block_diffusion import make_block_diffusion_loss
        from train.recipes.distill import Teaching

        settings = self.config.distill
        # A row with a short completion counts as much per token as a row of text.
        loss = make_block_diffusion_loss(
            self.dlm, dataclasses.replace(self.config.objective, normalization="supervised")
        )
        teaching = Teaching(self.rows["train"], self.tokenizer, settings, self.config.block_size, self.report)
        teacher = DLM
        for number in range(1, settings.rounds + 1):
            name = DISTILLED if number == settings.rounds else f"{DISTILLED}-{number}"
            if not self._trained(name):
                params = load_pretrained(self.root / teacher, dtype="float32").params
                path = self.root / f"{name}-run" / "pairs.npz"
                pairs = teaching.pairs(path, self.dlm, params, seed=self.config.seed + number)
                data = Mixture([(self.rows["train"], 1 - settings.share), (pairs, settings.share)])
                identity = {"pairs": pairs.fingerprint, "share": settings.share}
                if not self._fit(
                    name, self.dlm, settings.stage, lambda params=params: params, loss, loss, None, data, identity
                ):
                    return False
            teacher = name
        return True

    def _ar_losses(self) -> tuple[Any, Any]:
        """What to train on, and what to evaluate."""
        from train.objectives.next_token import make_next_token_loss

        plain = make_next_token_loss(self.ar)
        rate = self.config.input_dropout
        return make_dropped_input_loss(self.ar, rate) if rate else plain, plain

    def _conversion_loss(self) -> Any:
        from train.objectives.block_diffusion import make_block_diffusion_loss

        return make_block_diffusion_loss(self.dlm, self.config.objective)

    def measure(self, steps: int = 30) -> None:
        """Prints how long both stages would take on this machine, from some steps of random models."""
        import tempfile

        from train.data import batches
        from train.loop import fit, weights_of
        from train.metrics import Reporter

        conversion = self._conversion_loss()
        for name, lm, stage, loss in (
            (AR, self.ar, self.config.ar, self._ar_losses()[0]),
            (DLM, self.dlm, self.config.dlm, conversion),
        ):
            with tempfile.TemporaryDirectory() as scratch:
                short = dataclasses.replace(stage, steps=steps, warmup_steps=0, eval_every=0)
                run = dataclasses.replace(short.run(Path(scratch), 0), log_every=steps // 2, checkpoint_every=steps)
                data = batches(self.rows["train"], global_batch=stage.batch_size, seed=0)
                weights = weights_of(lm, self.mesh, None)
                before = time.perf_counter()
                fit(run, short.optim, self.mesh, weights, loss, data, identity={}, reporter=Reporter(enabled=False))
                total = time.perf_counter() - before
                last = json.loads((Path(scratch) / "metrics.jsonl").read_text().splitlines()[-1])
            seconds = last["perf/step_seconds"]
            self.report.line(
                f"{name}: {1000 * seconds:.1f} ms a step, {stage.steps} steps {stage.steps * seconds:.0f} s; "
                f"compiling and starting {max(0.0, total - steps * seconds):.0f} s"
            )

    def _fit(
        self,
        name: str,
        lm: "CausalLM",
        stage: StageConfig,
        create: Callable[[], Any] | None,
        loss: Any,
        eval_loss: Any,
        held_out: Callable[[Any], float] | None,
        rows: "Rows | None" = None,
        identity: dict[str, Any] | None = None,
    ) -> bool:
        """Trains one model of the chain; `held_out` chooses the best weights where the stage evaluates."""
        from jaxmodels import save_pretrained
        from train.data import batches, evaluation_batches
        from train.loop import fit, weights_of

        if self._trained(name):
            return True
        target = self.root / name
        self.report.line(f"{name}: {stage.steps} steps of {stage.batch_size} x {self.config.seq_len} tokens")
        run = stage.run(self.root / f"{name}-run", self.config.seed)
        keeper = _BestWeights(self.root / f"{name}-run", lm, held_out) if stage.eval_every and held_out else None
        before = time.perf_counter()
        result = fit(
            run,
            stage.optim,
            self.mesh,
            weights_of(lm, self.mesh, create, seed=self.config.seed),
            loss,
            batches(self.rows["train"] if rows is None else rows, global_batch=stage.batch_size, seed=self.config.seed),
            identity={
                "recipe": name,
                "model": to_json(lm.config),
                "data": self.rows["train"].fingerprint,
                "input_dropout": self.config.input_dropout,
                "half_life_ratio": self.config.half_life_ratio,
                **(identity or {}),
            },
            config=self.config,
            eval_data=lambda: evaluation_batches(self.rows["validation"], global_batch=stage.batch_size),
            eval_fn=eval_loss,
            on_eval=keeper,
            reporter=self.report,
        )
        seconds = time.perf_counter() - before
        if result.interrupted:
            return False
        params = result.state.params
        values: dict[str, Any] = {"seconds": round(seconds, 1), "steps": stage.steps}
        if keeper is not None:
            params, values["best_validation"] = keeper.best(params)
        dtype = "bfloat16"
        save_pretrained(target, lm, params, tokenizer=self.tokenizer, dtype=dtype)
        values |= {"parameters": _count(params), "evaluation": _scalars(result.evaluation)}
        self.record.stage(name, values)
        return True

    def _trained(self, name: str) -> bool:
        """Whether this model is there already."""
        target = self.root / name
        if (target / "config.json").is_file():
            self.report.line(f"{name}: already trained, in {target}")
            return True
        return False

    # -- evaluation
    # -----------------------------------------------------------------------------------------------

    def evaluate(self) -> bool:
        """Exact NLL of the AR model, bound of the diffusion model, and completions, all on test files."""
        import rich.table

        from jaxmodels import load_pretrained
        from train.drift import weight_drift

        before = time.perf_counter()
        ar = load_pretrained(self.root / AR, dtype="float32").params
        name = DISTILLED if self.config.distill.rounds else DLM
        dlm = load_pretrained(self.root / name, dtype="float32").params
        nats = self.ar_nats(ar, "test")
        bits = self._bits_per_byte
        rows: list[tuple[str, float, float | None]] = [("AR, exact", nats, None)]
        for block in (self.config.block_size // 2, self.config.block_size):
            rows.append((f"block diffusion, bound, block {block}", *self.bound_nats(dlm, "test", block, samples=4)))
        table = rich.table.Table("test files", "nats/token", "bits/byte")
        for label, value, error in rows:
            table.add_row(label, f"{value:.4f}" + (f" ± {error:.4f}" if error else ""), f"{bits(value):.4f}")
        drift = {name: value for name, value in weight_drift(dlm, ar).items() if isinstance(value, float)}
        values: dict[str, Any] = {
            "nats_per_token": {label: round(value, 5) for label, value, _ in rows},
            "bits_per_byte": {label: round(bits(value), 5) for label, value, _ in rows},
            "drift": drift,
        }
        self.report.console.print(table)
        if self.config.completions:
            values["completions"] = self._complete(dlm)
        values["seconds"] = round(time.perf_counter() - before, 1)
        self.record.stage("evaluation", values)
        return True

    def _bits_per_byte(self, nats_per_token: float) -> float:
        import math

        return nats_per_token * self._tokens_per_byte / math.log(2)

    @property
    def _tokens_per_byte(self) -> float:
        store = self.rows["test"]
        ids = store._tokens[: min(store.num_tokens, 200_000)]
        return len(ids) / len(self.tokenizer.decode(ids.tolist()).encode())

    def _batches(self, split: str) -> Iterator[dict[str, Any]]:
        from train.data import evaluation_batches

        size = min(64, len(self.rows[split]))
        return evaluation_batches(self.rows[split], global_batch=size, max_rows=self.config.eval_rows)

    def ar_nats(self, params: Any, split: str) -> float:
        """Exact nats per token (first tokens of documents excluded) under the AR model."""
        import jax

        from jaxmodels.decoding.block_diffusion import ar_nll

        @jax.jit
        def score(params, batch):
            out = ar_nll(
                self.ar, params, batch["tokens"], loss_mask=batch["loss_mask"], segment_ids=batch["segment_ids"]
            )
            return out.nats.sum(), out.tokens.sum()

        return _ratio(score(params, batch) for batch in self._batches(split))[0]

    def bound_nats(self, params: Any, split: str, block_size: int, samples: int) -> tuple[float, float]:
        """Unbiased bound in nats per token, and its standard error from the draws, on the tokens that the AR
        value counts."""
        import jax
        import jax.numpy as jnp

        from jaxmodels.decoding.block_diffusion import nelbo

        @jax.jit
        def score(params, batch, key):
            segments = batch["segment_ids"]
            first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
            out = nelbo(
                self.dlm, params, batch["tokens"], key, block_size=block_size, num_samples=samples,
                loss_mask=batch["loss_mask"] & ~first, segment_ids=segments,
            )  # fmt: skip
            return out.nats.sum(), out.tokens.sum(), jnp.sum(out.stderr**2)

        keys = (jax.random.fold_in(jax.random.key(1), i) for i in range(2**30))
        mean, variance = _ratio(score(params, batch, next(keys)) for batch in self._batches(split))
        return mean, variance**0.5

    def _complete(self, params: Any) -> dict[str, Any]:
        """Completions of test files at several thresholds: how many parse, and tokens per forward pass."""
        import rich.table

        from jaxmodels.decoding.block_diffusion import RevealOptions, generate
        from jaxmodels.demo.completions import MIN_STATEMENTS, parse_completion
        from jaxmodels.demo.prompts import corpus_prompts

        prompts = corpus_prompts(
            self.tokenizer, self.config.completions, max_tokens=self.config.seq_len // 2,
            multiple=self.config.block_size, seed=self.config.seed,
        )  # fmt: skip
        new = self.config.seq_len // 4
        table = rich.table.Table("threshold", "tokens per forward", "parses", f"≥ {MIN_STATEMENTS} statements")
        results = {}
        for threshold in (None, 0.9, 0.7, 0.5):
            done, stats = generate(
                self.dlm, params, [p.ids for p in prompts], max_new_tokens=new,
                reveal=RevealOptions(threshold=threshold), fused=True,
            )  # fmt: skip
            parsed = [
                parse_completion(
                    p.cut.context, self.tokenizer.decode(g.tokens), ended=g.tokens[-1] in self.dlm.config.eos_ids
                )
                for p, g in zip(prompts, done, strict=True)
            ]
            parses = sum(p.parses for p in parsed) / len(parsed)
            valid = sum(p.statements >= MIN_STATEMENTS for p in parsed) / len(parsed)
            label = "one token a step" if threshold is None else f"{threshold:g}"
            table.add_row(label, f"{stats.tpf_total:.2f}", f"{parses:.0%}", f"{valid:.0%}")
            results[label] = {"tokens_per_forward": round(stats.tpf_total, 3), "parses": parses, "statements": valid}
        self.report.console.print(table)
        return results


class _BestWeights:
    """Keeps the weights with the lowest held-out value on disk; called by the loop with each evaluation."""

    def __init__(self, directory: Path, lm: "CausalLM", held_out: Callable[[Any], float]):
        self.directory, self.lm, self.held_out = directory / "best", lm, held_out
        note = self.directory / "note.json"
        self.value = json.loads(note.read_text())["value"] if note.is_file() else float("inf")

    def __call__(self, params: Any) -> dict[str, float | list[float]]:
        from jaxmodels import save_pretrained

        value = self.held_out(params)
        if value < self.value:
            self.value = value
            save_pretrained(self.directory, self.lm, params, dtype="float32")
            (self.directory / "note.json").write_text(json.dumps({"value": value}))
        return {"eval/held_out": value, "eval/best": self.value}

    def best(self, params: Any) -> tuple[Any, float]:
        """The best weights so far and their value; `params` if none was kept."""
        from jaxmodels import load_pretrained

        if not (self.directory / "config.json").is_file():
            return params, float("nan")
        return load_pretrained(self.directory, dtype="float32").params, self.value


def make_dropped_input_loss(lm: "CausalLM", rate: float) -> Any:
    """The next-token loss with a share `rate` of the input tokens replaced by the mask token.

    The first token of a row is never replaced, targets are always clean.
    """
    import jax
    import jax.numpy as jnp

    from jaxmodels.decoding.block_diffusion.bound import require_mask_id
    from jaxmodels.decoding.cross_entropy import token_nll
    from train.objectives.next_token import next_token_targets

    mask_id = require_mask_id(lm.config)

    def loss_fn(params, batch, key):
        tokens = batch["tokens"]
        dropped = jax.random.uniform(key, tokens.shape) < rate
        inputs = jnp.where(dropped.at[:, 0].set(False), mask_id, tokens)
        targets, weights = next_token_targets(tokens, batch["segment_ids"], batch["loss_mask"])
        states = lm.hidden(params, inputs, positions=batch["positions"], segment_ids=batch["segment_ids"]).states
        flat = states.reshape(-1, states.shape[-1])
        nll, _ = token_nll(lambda rows: lm.head(params, rows), flat, targets.reshape(-1))
        weights = weights.reshape(-1)
        total = jnp.sum(weights * nll)
        return total, jnp.sum(weights), {"nll": total}

    return loss_fn


def _ratio(parts: Iterator[tuple]) -> tuple[float, float]:
    """(sum of firsts / sum of seconds, sum of thirds / (sum of seconds)^2)."""
    total, count, variance = 0.0, 0.0, 0.0
    for nats, tokens, *rest in parts:
        total, count = total + float(nats), count + float(tokens)
        variance += float(rest[0]) if rest else 0.0
    return total / count, variance / count**2


def _count(params: Any) -> int:
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _scalars(values: dict[str, Any]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in values.items() if isinstance(value, float)}
