"""Task `quickstart`: the shipped models complete real code, and the trade-off of block diffusion is measured.

JAX is imported by `main`, not by this module.
"""

import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infer.console import note, timed

if TYPE_CHECKING:
    import rich.console
    import rich.table

    from jaxmodels.demo.prompts import CodePrompt

ASSETS = Path(__file__).parent / "assets"
EXCERPTS = "prompts.jsonl"
FILES = (
    "glob.py",
    "json/__init__.py",
    "concurrent/futures/thread.py",
    "random.py",
    "netrc.py",
    "cmd.py",
    "dataclasses.py",
    "asyncio/runners.py",
    "multiprocessing/util.py",
    "statistics.py",
    "wsgiref/headers.py",
    "http/client.py",
    "pkgutil.py",
    "idlelib/replace.py",
    "urllib/robotparser.py",
    "string.py",
)
"""Held-out files of the demonstration corpus; each gives one prompt."""
AR = "ar"


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """Watch the shipped models complete real Python code, and see what block diffusion gains and costs.

    python -m infer quickstart

    Completions of held-out files of your Python's standard library stream block by block; then a table compares one
    token at a time (AR) with block diffusion at several confidence thresholds and by the rule that the shipped models
    were judged with, one request at a time, and a picture of the trade-off is saved. Takes a minute on two CPU cores;
    uses a GPU if JAX sees one.
    """

    models: Path = ASSETS
    """Directory with ar/ and dlm/: the shipped models, or what `python -m train quickstart` wrote."""
    picture: Path | None = Path("quickstart.png")
    """Where the picture goes (PNG, SVG or PDF by its ending); None: no picture."""
    prompts: int = len(FILES)
    """Prompts behind the table, at most 16."""
    show: int = 3
    """How many of them are streamed to the terminal first."""
    threshold: float = 0.9
    """Confidence threshold of the streamed completions: a pass fixes every token that is at least this sure."""
    thresholds: tuple[float, ...] = (0.95, 0.9, 0.8, 0.7, 0.5)
    """Thresholds in the table; one token a pass is always in it."""
    budget: float | None = 0.4
    """Budget of doubt of one more row: a pass fixes the surest tokens whose doubts stay below it. None: no such row."""
    lookahead: int | None = 6
    """That row's tokens are fixed among this many open ones, the first of a block. None: among all."""
    prompt_tokens: int | None = None
    """Longest prompt; default: half of the models' positions."""
    new_tokens: int | None = None
    """Tokens per completion; default: a quarter of the models' positions."""
    draws: int = 4
    """Random draws per text for the likelihood bound; 0: no likelihoods."""
    pause: float = 0.03
    """Seconds between two denoising passes when they are replayed; only on a terminal."""
    json: bool = False
    """Print one JSON object instead of text and table."""

    def __post_init__(self):
        if not 1 <= self.prompts <= len(FILES):
            raise ValueError(f"prompts must lie in 1..{len(FILES)}; got {self.prompts}")
        if not 0 <= self.show <= self.prompts:
            raise ValueError(f"show must lie in 0..prompts = {self.prompts}; got {self.show}")
        if not self.thresholds or any(not 0.0 <= t <= 1.0 for t in (self.threshold, *self.thresholds)):
            raise ValueError(f"thresholds must lie in [0, 1]; got {(self.threshold, *self.thresholds)}")
        for name, valid in (("budget", self.budget is None or self.budget > 0), ("lookahead", self.lookahead != 0)):
            if not valid:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")
        if self.draws == 1 or self.draws < 0:
            raise ValueError(f"draws must be 0 or at least 2 (their spread gives the error); got {self.draws}")
        if self.pause < 0:
            raise ValueError(f"pause must not be negative; got {self.pause}")
        for name in ("prompt_tokens", "new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive; got {value}")


@dataclasses.dataclass
class Arm:
    """Totals of one way of decoding over all prompts.

    `forwards` counts every pass that reveals or commits tokens: an AR model's prefill gives its first token and
    counts, a diffusion model's gives none and does not. `seconds`, one entry per completion, go from the prompt to the
    last token.
    """

    label: str
    reveal: dict[str, Any]  # RevealOptions; of a diffusion model, empty: one token a pass
    completions: list[list[int]] = dataclasses.field(default_factory=list)
    forwards: int = 0
    seconds: list[float] = dataclasses.field(default_factory=list)
    valid: int = 0
    agreement: float | None = None

    @property
    def short(self) -> str:
        if "budget" in self.reveal:
            return f"budget {self.reveal['budget']:g}"
        return f"{self.reveal['threshold']:g}" if self.reveal else "one a pass"

    @property
    def tokens(self) -> int:
        return sum(map(len, self.completions))

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / self.forwards

    @property
    def tokens_per_second(self) -> float:
        """Median over the completions, which one disturbance of the machine does not move."""
        return statistics.median(len(c) / s for c, s in zip(self.completions, self.seconds, strict=True))

    def add(self, tokens: Sequence[int], forwards: int, seconds: float) -> None:
        self.completions.append(list(tokens))
        self.forwards += forwards
        self.seconds.append(seconds)

    def to_json(self) -> dict[str, Any]:
        names = ("reveal", "tokens", "forwards", "tokens_per_forward", "tokens_per_second", "valid", "agreement")
        return {name: getattr(self, name) for name in names} | {"seconds": sum(self.seconds)}


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """What both models think of the files' own continuations, in bits per byte.

    ar: exact. bound: an upper bound of the diffusion model's value, unbiased; `error` is the standard error from
    its random draws, not from the choice of text.
    """

    ar: float
    bound: float
    error: float
    tokens: int
    bytes: int
    draws: int


def main(config: Quickstart) -> int:
    """Runs the task; returns the exit code."""
    import rich.console

    began = time.perf_counter()
    check_models(config.models)
    if config.picture is not None:
        config.picture.parent.mkdir(parents=True, exist_ok=True)
    console = rich.console.Console(quiet=config.json, highlight=False)
    with timed("loading JAX and the models"):
        pair = Pair.load(config)
    console.print(f"[bold]jaxstream[/] on {pair.device}: {pair.describe()}", soft_wrap=True)
    prompts, excerpts = load_prompts(
        pair.tokenizer, config.prompts, max_tokens=pair.prompt_tokens, multiple=pair.block, directory=None
    )
    if excerpts:
        note(
            f"{len(excerpts)} of {len(prompts)} prompts come with the package, because this Python's standard library "
            f"has other versions of their files (first: {excerpts[0]})"
        )
    with timed("compiling"):
        pair.warm(prompts[0].ids)
    shown = [show(pair, prompt, config, console) for prompt in prompts[: config.show]]
    arms = compare(pair, prompts, config)
    judge(arms, prompts, pair.tokenizer)
    likelihood = None
    if config.draws:
        with timed("likelihoods"):
            likelihood = score(pair, prompts, config.draws)
    console.print(table(arms, likelihood, pair))
    recorded = read_results(config.models)
    if config.picture is not None:
        from infer.picture import draw

        draw(config.picture, arms, len(prompts), pair.device, recorded)
        console.print(f"picture: {config.picture}", soft_wrap=True)
    seconds = time.perf_counter() - began
    note(f"{seconds:.0f} s in all")
    if config.json:
        report = {
            "device": pair.device,
            "models": str(config.models),
            "parameters": pair.parameters,
            "block_size": pair.block,
            "prompts": len(prompts),
            "prompts_from_package": list(excerpts),
            "prompt_tokens": pair.prompt_tokens,
            "new_tokens": pair.new_tokens,
            "arms": {arm.label: arm.to_json() for arm in arms},
            "likelihood": dataclasses.asdict(likelihood) if likelihood else None,
            "completions": shown,
            "picture": str(config.picture) if config.picture is not None else None,
            "seconds": seconds,
        }
        print(json.dumps(report, indent=1))
    return 0


def check_models(directory: Path) -> None:
    """Raises ValueError when a model is missing, and says how to get one."""
    for name in ("ar", "dlm"):
        if not (directory / name / "config.json").is_file():
            what = "the shipped models are not installed" if directory == ASSETS else "--models holds no pair"
            raise ValueError(
                f"{what}: {directory / name / 'config.json'} is missing; `python -m train quickstart` trains a small "
                "pair, then give --models runs/quickstart"
            )


def read_results(directory: Path) -> dict[str, Any] | None:
    """The judgement of these models by `python -m infer completions`, if it lies beside them."""
    path = directory / "results.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


# -- prompts


def load_prompts(
    tokenizer: Any, count: int, *, max_tokens: int, multiple: int, directory: Path | None
) -> tuple[list["CodePrompt"], tuple[str, ...]]:
    """(one prompt from each of the first `count` FILES, those files whose prompts come with the package).

    A file is read from the standard library when it is the one of the corpus' list, byte by byte; otherwise the
    excerpt in the package stands in for it, so that prompts are the same everywhere.

    Args:
        tokenizer: of the models.
        count: number of prompts.
        max_tokens: longest prompt.
        multiple: prompt lengths are multiples of this.
        directory: a standard library; None: the running interpreter's.
    """
    from jaxmodels.demo.corpus import corpus_files, stdlib_directory
    from jaxmodels.demo.prompts import prompt_at, read_prompts

    root = directory or stdlib_directory()
    digests = {file.path: file.sha256 for file in corpus_files() if file.split == "test"}
    shipped = {prompt.cut.path: prompt for prompt in read_prompts(ASSETS / EXCERPTS)}
    prompts, excerpts = [], []
    for path in FILES[:count]:
        try:
            content = (root / path).read_bytes()
        except OSError:
            content = b""
        if hashlib.sha256(content).hexdigest() == digests[path]:
            cut, following = choose_place(path, content.decode("utf-8"))
        else:
            cut, following = shipped[path].cut, shipped[path].following
            excerpts.append(path)
        prompts.append(prompt_at(tokenizer, cut, following, max_tokens=max_tokens, multiple=multiple))
    return prompts, tuple(excerpts)


def choose_place(path: str, text: str, seed: int = 0) -> tuple[Any, str]:
    """A place in a held-out file where a completion starts, drawn at random, and how the file goes on."""
    from jaxmodels.demo.completions import choose_cuts, find_cuts
    from jaxmodels.demo.prompts import FOLLOWING

    cuts = find_cuts(path, text, min_context=1200, max_context=4000)
    ends = {cut: text.index(cut.context) + len(cut.context) for cut in cuts}
    (cut,) = choose_cuts([cut for cut in cuts if len(text) - ends[cut] >= FOLLOWING], 1, seed)
    return cut, text[ends[cut] : ends[cut] + FOLLOWING]


def write_excerpts(path: Path = ASSETS / EXCERPTS) -> None:
    """Writes the prompts that ship with the package; run it under the Python of the corpus' list."""
    from jaxmodels.demo.corpus import load_corpus
    from jaxmodels.demo.prompts import CodePrompt, write_prompts

    texts = load_corpus().split("test")
    write_prompts(path, (CodePrompt((), *choose_place(name, texts[name])) for name in FILES))


# -- models


class Pair:
    """Both models, ready to run one request at a time."""

    def __init__(self, ar: Any, dlm: Any, prompt_tokens: int | None, new_tokens: int | None):
        """Raises ValueError for models that do not belong together or do not fit the request."""
        import jax

        from infer.text.engine import TextEngine
        from jaxmodels.decoding.block_diffusion import BlockDecoding, BlockStream

        if dlm.config.block_size is None:
            raise ValueError("dlm/config.json has no block_size: it is no block-diffusion model")
        if ar.tokenizer is None or dlm.tokenizer is None or ar.tokenizer.vocab_size != dlm.tokenizer.vocab_size:
            raise ValueError("ar/ and dlm/ must have the same tokenizer; one lacks it or they differ")
        self.ar, self.dlm, self.tokenizer = ar, dlm, dlm.tokenizer
        self.block = dlm.config.block_size
        positions = min(ar.config.max_positions, dlm.config.max_positions)
        self.prompt_tokens = (prompt_tokens or positions // 2) // self.block * self.block
        self.new_tokens = new_tokens or positions // 4
        self.positions = positions
        blocks = -(-self.new_tokens // self.block)
        capacity = self.prompt_tokens + blocks * self.block
        if self.prompt_tokens < self.block:
            raise ValueError(f"prompt_tokens must be at least a block of {self.block} tokens; got {prompt_tokens}")
        if capacity > positions:
            raise ValueError(
                f"prompt_tokens ({self.prompt_tokens}) and new_tokens ({self.new_tokens}, in blocks of {self.block}) "
                f"need {capacity} positions; the models have {positions}"
            )
        device = jax.devices()[0]
        on_cpu = device.platform == "cpu"
        self.device = _processor() if on_cpu else device.device_kind
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(dlm.params))
        # The engine calls the device once per as many tokens as the stream: neither waits more for the host.
        self.engine = TextEngine.from_pretrained(ar, capacity=capacity, chunk=self.block)
        self.stream: BlockStream = BlockStream(
            dlm.lm, dlm.lm.for_decoding(dlm.params), BlockDecoding.for_model(dlm.config), batch=1, capacity=capacity
        )

    @classmethod
    def load(cls, config: Quickstart) -> "Pair":
        import jax

        from jaxmodels import load_pretrained

        # CPUs compute bfloat16 in float32 anyway, after converting at every use.
        dtype = "float32" if jax.default_backend() == "cpu" else None
        ar, dlm = (load_pretrained(config.models / name, dtype=dtype) for name in ("ar", "dlm"))
        return cls(ar, dlm, config.prompt_tokens, config.new_tokens)

    def describe(self) -> str:
        """Size and structure in words."""
        c = self.dlm.config
        return (
            f"two models of {self.parameters / 1e6:.1f} M parameters ({c.layers} layers of width {c.dim}), blocks of "
            f"{self.block} tokens"
        )

    def warm(self, ids: Sequence[int]) -> None:
        """Compiles everything that completions of such prompts need."""
        self.run_ar(ids)
        self.run_dlm(ids, {"threshold": 0.5})

    def run_ar(self, ids: Sequence[int]) -> tuple[list[int], int, float]:
        """(new tokens, forwards, seconds) of one token at a time, greedy."""
        from infer.text.requests import Request

        begun = time.perf_counter()
        request = Request(ids=tuple(ids), max_new_tokens=self.new_tokens, temperature=0.0)
        (done,) = self.engine.complete([request])
        return list(done.tokens), done.usage.forwards + 1, time.perf_counter() - begun

    def run_dlm(
        self, ids: Sequence[int], reveal: dict[str, Any], on_block: Callable[[Any], None] | None = None
    ) -> tuple[list[int], int, float]:
        """The same for block diffusion by these RevealOptions (none: one token a pass), greedy."""
        from jaxmodels.decoding.block_diffusion import RevealOptions, generate

        (done,), stats = generate(
            self.dlm.lm, self.stream.params, [ids], max_new_tokens=self.new_tokens,
            reveal=RevealOptions(**reveal), stream=self.stream, on_block=on_block,
        )  # fmt: skip
        return done.tokens, done.denoise_steps + done.commits, stats.seconds


def _processor() -> str:
    """The CPU's name where the system tells it, and how many cores this process may use."""
    import os
    import platform

    name = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = names[0] if names else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


# -- what is shown and measured


def show(pair: Pair, prompt: "CodePrompt", config: Quickstart, console: "rich.console.Console") -> dict[str, Any]:
    """Streams one completion; returns it for the JSON report."""
    import jax
    import rich.text

    from infer.replay import Replay

    lines = prompt.cut.context.splitlines()[-8:]
    console.print()
    console.rule(f"held-out file {prompt.cut.path}, threshold {config.threshold:g}", align="left")
    console.print(rich.text.Text("\n".join(lines), style="dim"), end="", soft_wrap=True)
    replay = Replay(console, pair.tokenizer, pause=config.pause)
    waited = 0.0

    def on_block(output: Any) -> None:
        nonlocal waited
        counts, tokens, reveal = jax.device_get((output.counts, output.tokens, output.reveal))
        begun = time.perf_counter()
        replay.block(tokens[0, : counts[0]].tolist(), reveal[0, : counts[0]].tolist())
        waited += time.perf_counter() - begun

    with replay:
        tokens, forwards, seconds = pair.run_dlm(prompt.ids, {"threshold": config.threshold}, on_block)
    seconds -= waited
    console.print(
        f"[green]{len(tokens)} tokens in {forwards} forwards[/], {len(tokens) / forwards:.2f} per forward, "
        f"{1000 * seconds:.0f} ms",
        soft_wrap=True,
    )
    text = pair.tokenizer.decode(tokens)
    return {
        "path": prompt.cut.path,
        "threshold": config.threshold,
        "text": text,
        "tokens": tokens,
        "forwards": forwards,
    }


def compare(pair: Pair, prompts: Sequence["CodePrompt"], config: Quickstart) -> list[Arm]:
    """All arms on all prompts. Arms alternate, so that whatever else the machine does hits all of them alike."""
    import rich.console
    import rich.progress

    arms = [Arm(AR, {}), Arm("one token a pass", {})]
    arms += [Arm(f"threshold {t:g}", {"threshold": t}) for t in sorted(set(config.thresholds), reverse=True)]
    if config.budget is not None:
        arms.append(Arm(f"budget {config.budget:g}", {"budget": config.budget, "lookahead": config.lookahead}))
    log = rich.console.Console(stderr=True)
    steps = rich.progress.track(prompts, "comparing", console=log, transient=True, disable=not log.is_terminal)
    for prompt in steps:
        for arm in arms:
            arm.add(*(pair.run_ar(prompt.ids) if arm.label == AR else pair.run_dlm(prompt.ids, arm.reveal)))
    return arms


def judge(arms: Sequence[Arm], prompts: Sequence["CodePrompt"], tokenizer: Any) -> None:
    """Fills in `valid` (completions that parse after their context and hold enough statements) and `agreement`:
    which share of a completion stands before its first difference to one token a pass, on average."""
    from jaxmodels.demo.completions import MIN_STATEMENTS, parse_completion

    special = tokenizer.special_ids
    reference = next(arm for arm in arms if arm.label != AR and not arm.reveal)
    for arm in arms:
        for prompt, tokens in zip(prompts, arm.completions, strict=True):
            ended = bool(tokens) and tokens[-1] in special
            parsed = parse_completion(prompt.cut.context, tokenizer.decode(tokens), ended=ended)
            arm.valid += parsed.statements >= MIN_STATEMENTS
        if arm.label != AR:
            pairs = zip(reference.completions, arm.completions, strict=True)
            arm.agreement = sum(common_share(a, b) for a, b in pairs) / len(prompts)


def common_share(first: Sequence[int], second: Sequence[int]) -> float:
    """Length of the common beginning over the longer length."""
    longest = max(len(first), len(second))
    same = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    return same / longest if longest else 1.0


def score(pair: Pair, prompts: Sequence["CodePrompt"], draws: int) -> Likelihood:
    """Likelihood of the files' own continuations after the prompts, up to the models' longest input."""
    import math

    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxmodels.decoding.block_diffusion import ar_nll, nelbo

    tokens = np.zeros((len(prompts), pair.positions), np.int32)
    segments, scored = np.zeros(tokens.shape, np.int32), np.zeros(tokens.shape, bool)
    size = 0
    for row, prompt in enumerate(prompts):
        following = pair.tokenizer.encode(prompt.following, add_special_tokens=False)
        # Whole blocks, of which the bound is a sum; the excerpt ends anywhere, perhaps inside a token.
        end = min(pair.positions, len(prompt.ids) + len(following) - 1) // pair.block * pair.block
        following = following[: end - len(prompt.ids)]
        tokens[row, :end] = [*prompt.ids, *following]
        segments[row, :end] = 1
        scored[row, len(prompt.ids) : end] = True
        size += len(pair.tokenizer.decode(following).encode())
    total = int(scored.sum())
    ids = jnp.asarray(tokens)
    limits: dict[str, Any] = {"loss_mask": jnp.asarray(scored), "segment_ids": jnp.asarray(segments)}

    @jax.jit
    def exact(params):
        return ar_nll(pair.ar.lm, params, ids, **limits).nats.sum()

    @jax.jit
    def bound(params, key):
        out = nelbo(pair.dlm.lm, params, ids, key, block_size=pair.block, num_samples=draws, **limits)
        return out.nats.sum(), jnp.sqrt(jnp.sum(out.stderr**2))

    upper, error = bound(pair.dlm.params, jax.random.key(0))
    unit = math.log(2) * size
    return Likelihood(float(exact(pair.ar.params)) / unit, float(upper) / unit, float(error) / unit, total, size, draws)


def table(arms: Sequence[Arm], likelihood: Likelihood | None, pair: Pair) -> "rich.table.Table":
    """The comparison for terminals."""
    import rich.box
    import rich.table

    count = len(arms[0].completions)
    caption = (
        f"{count} prompts of {pair.prompt_tokens} tokens, {pair.new_tokens} new tokens each, one request at a time, "
        "greedy.\ntokens/s: median, prefill included.\n"
        "same: share of a completion before it first differs from one token a pass.\n"
        "parses: parses after its context and holds at least 3 new statements."
    )
    for arm in arms:
        if "budget" in arm.reveal:
            among = arm.reveal["lookahead"]
            where = "all open tokens" if among is None else f"the first {among} open tokens"
            caption += f"\n{arm.short}: the surest of {where} whose doubts stay below it together."
    if likelihood:
        caption += (
            f"\nbits/byte: the files' own continuations, {likelihood.tokens:,} tokens of {likelihood.bytes:,} bytes; "
            f"AR exact, diffusion an unbiased upper bound (standard error of {likelihood.draws} draws: "
            f"{likelihood.error:.3f})."
        )
    result = rich.table.Table(
        title="one token at a time against block diffusion",
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=rich.box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    for name in ("decoding, threshold", "tokens/\nforward", "forwards", "tokens/s", "same", "parses", "bits/byte"):
        result.add_column(name, justify="left" if name.startswith("decoding") else "right", no_wrap=True)
    values = {0: f"{likelihood.ar:.3f}", 1: f"≤ {likelihood.bound:.3f}"} if likelihood else {}
    for row, arm in enumerate(arms):
        result.add_row(
            "autoregressive" if arm.label == AR else f"diffusion, {arm.short}",
            f"{arm.tokens_per_forward:.2f}",
            f"{arm.forwards:,}",
            f"{arm.tokens_per_second:,.0f}",
            "" if arm.agreement is None else f"{arm.agreement:.0%}",
            f"{arm.valid}/{count}",
            values.get(row, "″" if likelihood else ""),
            end_section=row == 0,
        )
    return result
