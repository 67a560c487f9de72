"""Task `calibrate-threshold`: the fastest confidence threshold whose loss of quality is tolerated.

JAX is imported by `main`, not by this module.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from infer.console import CompileNotes, note, timed
from infer.quickstart import common_share
from infer.text.events import Completion
from infer.text.jsonl import read_requests
from infer.text.requests import Request

if TYPE_CHECKING:
    from infer.text.engine import TextEngine


@dataclasses.dataclass(frozen=True)
class CalibrateThreshold:
    """Choose --threshold for a block-diffusion model on prompts of your own.

    python -m infer calibrate-threshold --model DIR --data prompts.jsonl --tolerance 0.02

    Every prompt is completed one token per pass, then at each threshold. A threshold is good when the upper end of the
    one-sided 95 % interval of its mean loss of score, prompt by prompt against one token per pass, is at most
    --tolerance; of the good ones the fastest is chosen. Few prompts give wide intervals and a careful choice.
    """

    model: str
    """Directory with config.json and safetensors, or a Hugging Face repository org/name."""
    data: Path
    """Requests as for `text --jsonl`, one JSON object a line, each with an "answer" for --score answer."""
    tolerance: float
    """Mean loss of score that is accepted: 0.02 is two points of a hundred, or with --score judge 0.02 nats a token."""
    score: Literal["agreement", "answer", "judge"] = "agreement"
    """agreement: length of the beginning shared with what one token per pass gives, over the longer length. answer:
    whether the text contains the line's "answer". judge: mean log-probability of a token under the model --judge."""
    judge: str | None = None
    """Autoregressive model with the same tokenizer, for --score judge."""
    thresholds: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    """Candidates."""
    max_new_tokens: int = 128
    """Most tokens per completion, where a line does not say."""
    batch: int = 8
    """Prompts decoded at a time."""
    mask_id: int | None = None
    """Id of the mask token, for a model whose config.json lacks it; never guessed."""
    block_length: int | None = None
    """Tokens decoded together; default: the checkpoint's training block."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type of weights and computation; default: the checkpoint's."""
    json: bool = False
    """Print one JSON object instead of a table."""
    quiet: bool = False
    """Print no progress."""

    def __post_init__(self):
        if not self.tolerance >= 0.0:
            raise ValueError(f"--tolerance must not be negative; got {self.tolerance}")
        if not self.thresholds or not all(0.0 <= t <= 1.0 for t in self.thresholds):
            raise ValueError(f"--thresholds must lie in [0, 1]; got {self.thresholds}")
        if (self.judge is None) != (self.score != "judge"):
            raise ValueError(f"--judge and --score judge belong together; got {self.judge} and {self.score}")
        for name in ("max_new_tokens", "batch", "block_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {value}")


def main(config: CalibrateThreshold) -> int:
    """Runs the task; the table and the choice go to stdout."""
    requests, answers = read_examples(config)
    from infer.text.diffusion import DiffusionDecoder
    from infer.text.engine import TextEngine
    from jaxmodels.decoding.block_diffusion.calibration import calibrate
    from jaxmodels.decoding.block_diffusion.generation import BlockDecoding, RevealOptions
    from jaxmodels.decoding.block_diffusion.stream import Generated
    from jaxmodels.pretrained import load_pretrained

    with timed(f"loading {config.model}", config.quiet):
        model = load_pretrained(config.model, dtype=config.dtype, mask_id=config.mask_id)
    engine = TextEngine.from_pretrained(
        model,
        batch=min(config.batch, len(requests)),
        requests=requests,
        on_compile=CompileNotes(config.quiet),
        diffusion={
            "decoding": BlockDecoding.for_model(model.config, block_length=config.block_length),
            "default": RevealOptions(),  # one token per pass
        },
    )
    assert isinstance(engine.decoder, DiffusionDecoder)
    judge = None if config.judge is None else _judge(config, engine, requests)
    one_by_one: list[Completion] = []

    def run(threshold: float | None) -> list[Generated]:
        options = {} if threshold is None else {"threshold": threshold}
        done = engine.complete([dataclasses.replace(request, options=options) for request in requests])
        if threshold is None:
            one_by_one.extend(done)
        if not config.quiet:
            name = "one token per pass" if threshold is None else f"threshold {threshold:g}"
            note(f"{name}: {sum(c.usage.new_tokens for c in done):,} tokens in {engine.elapsed:.1f} s")
        return [
            Generated(list(c.tokens), [], [], [], [], denoise_steps=c.usage.forwards - c.usage.commits) for c in done
        ]

    def score(i: int, result: Generated) -> float:
        if judge is not None:
            return judge(i, result.tokens)
        if answers is not None:
            return float(answers[i] in engine.tokenizer.decode(result.tokens))
        return common_share(result.tokens, one_by_one[i].tokens)

    found = calibrate(run, score, tolerance=config.tolerance, thresholds=config.thresholds)
    trials = [dataclasses.asdict(trial) for trial in found.trials]
    if config.json:
        record = {"threshold": found.threshold, "prompts": len(requests), "score": config.score, "trials": trials}
        print(json.dumps(record))
        return 0
    print(f"{'threshold':>12}  {'score':>8}  {'loss':>8}  {'at most':>8}  {'tokens per pass':>15}")
    for trial in found.trials:
        name = "one a pass" if trial.threshold is None else f"{trial.threshold:g}"
        values = f"{trial.quality:8.4f}  {trial.loss:8.4f}  {trial.loss_upper:8.4f}  {trial.tokens_per_step:15.2f}"
        print(f"{name:>12}  {values}" + ("  chosen" if trial.threshold == found.threshold else ""))
    if found.threshold is None:
        print(f"no threshold loses at most {config.tolerance:g}: decode one token per pass, --threshold 1")
    return 0


def read_examples(config: CalibrateThreshold) -> tuple[list[Request], list[str] | None]:
    """Requests, and with --score answer what each of them must contain."""
    lines: list[bytes] = []
    answers: list[str] = []
    try:
        source = config.data.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"--data {config.data}: {error.strerror}") from None
    for number, line in enumerate(source, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None  # an empty line, or one that `read_requests` will name
        if isinstance(record, dict):
            answer = record.pop("answer", None)
            where = f"{config.data}, line {number}"
            if record.get("options"):
                raise ValueError(f"{where}: options are what is calibrated; got {record['options']!r}")
            if config.score == "answer" and not (isinstance(answer, str) and answer):
                raise ValueError(f"{where}: answer must be a string that is not empty; got {answer!r}")
            answers.append(answer)
            line = json.dumps(record).encode()
        lines.append(line)
    requests = [r for _, r in read_requests(lines, str(config.data), {"max_new_tokens": config.max_new_tokens})]
    if not requests:
        raise ValueError(f"--data {config.data}: holds no request")
    return requests, answers if config.score == "answer" else None


def _judge(
    config: CalibrateThreshold, engine: "TextEngine", requests: Iterable[Request]
) -> Callable[[int, Sequence[int]], float]:
    """score(prompt number, new tokens): their mean log-probability in nats under the judge, one program for all."""
    import jax
    import numpy as np

    from jaxmodels.decoding.block_diffusion.bound import ar_nll
    from jaxmodels.pretrained import load_pretrained

    assert config.judge is not None
    with timed(f"loading {config.judge}", config.quiet):
        judge = load_pretrained(config.judge, dtype=config.dtype)
    text = "def f(x):\n    return {'a': x, 'β': 10}  # The quick brown fox\n"
    if not judge.tokenizer or not engine.tokenizer or judge.tokenizer.encode(text) != engine.tokenizer.encode(text):
        raise ValueError(f"--judge {config.judge}: its tokenizer must be that of {config.model}")
    prompts = [engine.prepare(request).prompt for request in requests]
    length = max(len(p) + (r.max_new_tokens or 0) for p, r in zip(prompts, requests, strict=True))
    nats = jax.jit(lambda params, tokens, scored: ar_nll(judge.lm, params, tokens, loss_mask=scored).nats[0])

    def score(i: int, new: Sequence[int]) -> float:
        tokens, scored = np.zeros((1, length), np.int32), np.zeros((1, length), bool)
        start = len(prompts[i])
        tokens[0, : start + len(new)] = [*prompts[i].tolist(), *new]
        scored[0, start : start + len(new)] = True
        return -float(nats(judge.params, tokens, scored)) / max(len(new), 1)

    return score
