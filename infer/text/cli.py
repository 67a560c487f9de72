"""`python -m infer text`: complete prompts with a language model. JAX is imported by `main`, not by this module."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from infer.console import CompileNotes, note, timed
from infer.text.events import Completion, Event, Job
from infer.text.jsonl import ResultFile, read_requests
from infer.text.requests import MAX_TOP_LOGPROBS, SAMPLING_FIELDS, Request
from jaxmodels.command_line import to_json

if TYPE_CHECKING:
    from infer.text.engine import TextEngine


REVEAL = ("threshold", "factor", "budget", "lookahead", "steps")
"""Flags that are options of a request to the diffusion decoder."""
DIFFUSION_ONLY = (
    *REVEAL, "mask_id", "infill", "block_length", "confidence", "prompt_attention", "align_blocks", "fused", "live",
)  # fmt: skip
AR_ONLY = (
    "chunk", "window", "sinks", "prefill_chunk", "top_logprobs", "target_sparsity", "skip_scale_factor",
    "skip_decode_scale_factor",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Text:
    """Complete text with a language model, streaming to the terminal.

    Give one prompt (--prompt, or standard input), a conversation (--chat), or many requests (--jsonl). Sampling
    options that are not given come from the checkpoint's generation_config.json; without one, decoding is greedy.
    The first run of a model compiles its programs; they are kept in ~/.cache/jaxstream/xla (or
    JAX_COMPILATION_CACHE_DIR) and reused by later runs.
    """

    model: str
    """Directory with config.json and safetensors, or a Hugging Face repository org/name."""
    prompt: str | None = None
    """Text to continue. Without --prompt, --chat or --jsonl, standard input is the prompt."""
    chat: bool = False
    """Use the checkpoint's chat template: with --prompt for one answer, else a conversation, one line per turn."""
    system: str | None = None
    """System message of --chat."""
    jsonl: Path | None = None
    """File of requests, one JSON object a line: "prompt", "messages" or "ids", and optionally "id" and any sampling
    option under the name of its flag with underscores."""
    out: Path | None = None
    """Where results of --jsonl go, one JSON object a line; without it, standard output. A file is appended to, and
    requests whose id has a result in it are skipped, so the same command continues a killed run. The configuration is
    written beside it, to OUT.config.json."""
    json: bool = False
    """Print one JSON object per completion instead of streaming text."""
    max_new_tokens: int | None = None
    """Most tokens to generate; default: generation_config.json, else 256."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """String that ends the text and is not printed; may be given several times."""
    temperature: float | None = None
    """0 is greedy."""
    top_k: int | None = None
    """Draw from the k most probable tokens; 0 is off."""
    top_p: float | None = None
    """Draw from the most probable tokens that make up this mass; 1 is off."""
    min_p: float | None = None
    """Draw from tokens with at least this fraction of the best token's probability; 0 is off."""
    repetition_penalty: float | None = None
    """Divide the logits of tokens that occurred in prompt or output (multiply negative ones); 1 is off."""
    presence_penalty: float | None = None
    """Subtract from the logits of tokens that occurred in the output; 0 is off."""
    seed: int | None = None
    """Seed of the draws, 0 <= seed < 2**32; equal requests with equal seeds give equal text. Default 0."""
    ignore_eos: bool = False
    """Go on after an end-of-text token."""
    logprobs: bool = False
    """Report each token's log-probability; needs --json or --jsonl."""
    top_logprobs: int = 0
    """Also report so many of the most probable tokens at each place (AR); needs --json or --jsonl."""
    batch: int | None = None
    """Requests decoded at a time; default 1, with --jsonl 8."""
    capacity: int | None = None
    """Cache slots per request, for prompt and new tokens; default: what the requests need, 4096 for a conversation."""
    window: int | None = None
    """AR: keep only the first --sinks tokens and the latest WINDOW ones, and let each token see just these: prompt and
    text may then be of any length, in fixed memory."""
    sinks: int | None = None
    """AR: first tokens that stay visible with --window; default 4."""
    prefill_chunk: int | None = None
    """AR: read prompts longer than this in pieces of it, which takes less memory; default: in one piece, with --window
    the window or 8192, whichever is less."""
    chunk: int | None = None
    """Tokens decoded per call of the device; default 1, with --jsonl 8. More hides the host behind a small model."""
    kv_cache: Literal["int8", "fp8"] | None = None
    """Keep keys and values in eight bits, which halves the memory of long contexts: int8 with a scale per token and
    head, fp8 with one per layer (the checkpoint's, else 1); default: the data type of the weights."""
    head: Literal["int8", "fp8"] | None = None
    """Round the vocabulary projection to eight bits after loading; default: as the checkpoint has it."""
    decoder: Literal["auto", "ar", "diffusion"] = "auto"
    """ar: one token per forward pass. diffusion: blocks of tokens, several per pass. auto: diffusion if the checkpoint
    was trained for it (its config.json has a block size and a mask token)."""
    mask_id: int | None = None
    """Diffusion: id of the mask token, for a model whose config.json lacks it; never guessed. May need --decoder
    diffusion, where the training block is not in config.json either."""
    infill: bool = False
    """Diffusion: fill in the holes of the prompt: each <fill:N> stands for N tokens. Prints the whole text; with
    --max-new-tokens it also goes on after it."""
    block_length: int | None = None
    """Diffusion: tokens decoded together; default: the checkpoint's training block."""
    threshold: float | None = None
    """Diffusion: reveal every token with at least this confidence; 0 decodes a block in one step, 1 a token per step.
    Default 0.9 unless --factor, --budget or --steps is given."""
    factor: float | None = None
    """Diffusion: reveal the n most confident tokens, largest n with (n + 1)(1 - n-th confidence) < factor."""
    budget: float | None = None
    """Diffusion: reveal the n most confident tokens, largest n whose (1 - confidence) add up to less than this."""
    lookahead: int | None = None
    """Diffusion: with one of these three, reveal only among this many masked tokens, the first of the block."""
    steps: int | None = None
    """Diffusion: denoising steps for all new tokens; alone it reveals equal portions, with another rule it is a
    limit."""
    confidence: Literal["prob", "top_p_margin", "neg_entropy", "random"] = "prob"
    """Diffusion: what confidence means: probability; lead over the second token; exp(-entropy); chance."""
    prompt_attention: Literal["bidirectional", "block_causal", "causal"] | None = None
    """Diffusion: how the prompt sees itself; default: as the checkpoint was trained."""
    align_blocks: bool = False
    """Diffusion: start blocks at multiples of their length, as in training, not at the end of the prompt."""
    fused: bool = True
    """Diffusion: commit a block in the pass that starts the next one."""
    live: bool = False
    """Diffusion: show every denoising pass as it happens; one request at a time, slower."""
    target_sparsity: float | None = None
    """Skip-softmax attention that leaves out about this share of its tiles, in [0, 1), in prompts and decode steps; the
    checkpoint must be calibrated (python -m infer calibrate-sparsity). Autoregressive decoder only."""
    skip_scale_factor: float | None = None
    """The same for prompts alone, by a scale factor: tiles are skipped below the threshold factor / prompt length;
    prompts no longer than the factor are read densely."""
    skip_decode_scale_factor: float | None = None
    """The same for decode steps alone."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type of weights and computation; default: the checkpoint's."""
    quiet: bool = False
    """Print no progress and no statistics."""

    def __post_init__(self):
        def refuse(flag: str, given: bool, why: str) -> None:
            if given:
                raise ValueError(f"--{flag} {why}")

        refuse("prompt", self.prompt is not None and self.jsonl is not None, "cannot be combined with --jsonl")
        refuse("chat", self.chat and self.jsonl is not None, 'cannot be combined with --jsonl; use "messages" there')
        refuse("system", self.system is not None and not self.chat, "needs --chat")
        refuse("out", self.out is not None and self.jsonl is None, "needs --jsonl")
        refuse("logprobs", self.logprobs and not (self.json or self.jsonl), "needs --json or --jsonl")
        refuse(
            "top-logprobs",
            not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS,
            f"must lie in 0..{MAX_TOP_LOGPROBS}; got {self.top_logprobs}",
        )
        refuse("top-logprobs", self.top_logprobs > 0 and not (self.json or self.jsonl), "needs --json or --jsonl")
        refuse("capacity", self.capacity is not None and self.window is not None, "cannot be combined with --window")
        refuse("sinks", self.sinks is not None and self.window is None, "needs --window")
        refuse("sinks", self.sinks is not None and self.sinks < 0, f"must not be negative; got {self.sinks}")
        refuse(
            "prefill-chunk",
            None not in (self.prefill_chunk, self.window) and self.prefill_chunk > self.window,  # type: ignore[operator]
            f"must be at most --window; got {self.prefill_chunk} and {self.window}",
        )
        refuse("infill", self.infill and bool(self.stop), "cannot be combined with --stop")
        refuse("infill", self.infill and self.chat, 'cannot be combined with --chat; use "messages" in --jsonl')
        refuse("live", self.live and (self.json or self.jsonl is not None), "cannot be combined with --json or --jsonl")
        refuse("live", self.live and self.batch not in (None, 1), "shows one request at a time; --batch must be 1")
        rules = self.given(("threshold", "factor", "budget"))
        refuse(rules[-1] if rules else "", len(rules) > 1, f"cannot be combined with --{rules[0] if rules else ''}")
        refuse("lookahead", self.lookahead is not None and not rules, "needs --threshold, --factor or --budget")
        refuse(
            "threshold",
            self.threshold is not None and not 0.0 <= self.threshold <= 1.0,
            f"must lie in [0, 1]; got {self.threshold}",
        )
        for name in ("factor", "budget"):
            value = getattr(self, name)
            refuse(name, value is not None and not value > 0.0, f"must be positive; got {value}")
        target = self.target_sparsity
        refuse("target-sparsity", target is not None and not 0.0 <= target < 1.0, f"must lie in [0, 1); got {target}")
        for name in ("skip_scale_factor", "skip_decode_scale_factor"):
            scale, flag = getattr(self, name), name.replace("_", "-")
            refuse(flag, scale is not None and target is not None, "cannot be combined with --target-sparsity")
            refuse(flag, scale is not None and not 0.0 < scale < 1e12, f"must be positive; got {scale}")
            refuse(flag, scale is not None and self.window is not None, "cannot be combined with --window")
        in_one = target is not None or self.skip_scale_factor is not None
        for name in ("window", "prefill_chunk"):
            clash = in_one and getattr(self, name) is not None
            refuse(name.replace("_", "-"), clash, "cannot be combined with --target-sparsity or --skip-scale-factor")
        if self.decoder == "ar" and (given := self.given(DIFFUSION_ONLY)):
            raise ValueError(f"--{given[0]} needs the diffusion decoder; got --decoder ar")
        if self.decoder == "diffusion" and (given := self.given(AR_ONLY)):
            raise ValueError(f"--{given[0]} needs the autoregressive decoder; got --decoder diffusion")
        names = ("batch", "capacity", "window", "prefill_chunk", "chunk", "max_new_tokens", "block_length")
        for name in (*names, "lookahead", "steps"):
            value, least = getattr(self, name), 0 if name == "max_new_tokens" and self.infill else 1
            refuse(
                name.replace("_", "-"), value is not None and value < least, f"must be at least {least}; got {value}"
            )

    def defaults(self) -> dict[str, Any]:
        """What the flags say about every request."""
        names = ("max_new_tokens", "stop", "logprobs", "top_logprobs", "infill", *SAMPLING_FIELDS)
        values = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        reveal = {name: getattr(self, name) for name in REVEAL if getattr(self, name) is not None}
        return values | ({"eos_ids": ()} if self.ignore_eos else {}) | ({"options": reveal} if reveal else {})

    def given(self, names: Sequence[str]) -> list[str]:
        """Those of these fields that are not at their default, as flags."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return [name.replace("_", "-") for name in names if getattr(self, name) != defaults[name]]


def main(config: Text) -> int:
    """Runs the task; returns the exit code. Input is read and checked before the model is loaded."""
    if config.jsonl is not None:
        return _run_jsonl(config)
    if config.chat and config.prompt is None:
        return _run_conversation(config)
    prompt = config.prompt
    if prompt is None:
        if sys.stdin.isatty():
            note("error: give --prompt TEXT, --chat or --jsonl FILE, or a prompt on standard input")
            return 2
        prompt = _decode(sys.stdin.buffer.read(), "standard input").rstrip("\n")
    if config.chat:
        request = Request(messages=_conversation(config, prompt), **config.defaults())
    else:
        request = Request(prompt=prompt, **config.defaults())
    pretrained = _load(config)
    engine = _engine(config, pretrained, [request], batch=1)
    _stream(config, engine, request, keep=config.json)
    return 0


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 ({error.reason} at byte {error.start})") from None


def _conversation(config: Text, *turns: str) -> list[dict[str, str]]:
    """Messages from alternating turns of user and assistant."""
    messages = [] if config.system is None else [{"role": "system", "content": config.system}]
    roles = ("user", "assistant")
    return messages + [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]


def _load(config: Text) -> Any:
    with timed(f"loading {config.model}", config.quiet):
        from jaxmodels.pretrained import load_pretrained

        try:
            loaded = load_pretrained(config.model, dtype=config.dtype, mask_id=config.mask_id, head=config.head)
        except ValueError as error:
            if config.mask_id is None and "mask_token_id" in str(error):
                raise ValueError(f"{error} (on the command line: --mask-id ID)") from None
            raise
        # Nobody keeps the parameters as they were loaded, which may be of the same size once more.
        return dataclasses.replace(loaded, params=loaded.lm.for_decoding(loaded.params))


def _engine(config: Text, pretrained: Any, requests: Sequence[Request], batch: int, chunk: int = 1) -> "TextEngine":
    from infer.text.engine import TextEngine

    skips = _skips(config, pretrained)
    diffusion = _diffusion(config, pretrained, infill=any(request.infill for request in requests))
    return TextEngine.from_pretrained(
        pretrained,
        batch=batch if config.batch is None else config.batch,
        capacity=config.capacity,
        window=config.window,
        num_sinks=4 if config.sinks is None else config.sinks,
        requests=requests,
        chunk=chunk if config.chunk is None else config.chunk,
        prefill_chunk=config.prefill_chunk,
        on_compile=CompileNotes(config.quiet),
        diffusion=diffusion,
        kv_cache=config.kv_cache,
        **skips,
    )


def _skips(config: Text, pretrained: Any) -> dict[str, Any]:
    """Skip-softmax settings of prompts and of decode steps, as the engine takes them, and a line about each."""
    asked = {
        "prefill": {"target_sparsity": config.target_sparsity, "scale_factor": config.skip_scale_factor},
        "decode": {"target_sparsity": config.target_sparsity, "scale_factor": config.skip_decode_scale_factor},
    }
    block = pretrained.sparse_attention
    if config.target_sparsity is not None and block is not None and block.decode is None:
        asked["decode"] = {}
        if not config.quiet:
            note(f"{config.model} is calibrated for prompts only: decode steps skip nothing")
    skips = {}
    for phase, options in asked.items():
        if all(value is None for value in options.values()):
            continue
        skip = skips["skip" if phase == "prefill" else "decode_skip"] = pretrained.skip(phase, **options)
        if not config.quiet:
            factor = skip.scale_factor
            note(f"{phase} beyond {factor:.4g} tokens skips tiles of attention below {factor:.4g} / length")
    if not skips and block is not None and not config.quiet:
        note(f"{config.model} has calibrated skip-softmax thresholds; --target-sparsity uses them")
    return skips


def _diffusion(config: Text, pretrained: Any, *, infill: bool) -> dict[str, Any] | None:
    """Arguments of the diffusion decoder, or None for the autoregressive one."""
    model = pretrained.config
    trained = model.block_size is not None and model.mask_id is not None
    if config.decoder == "ar" or (config.decoder == "auto" and not trained):
        if given := config.given(DIFFUSION_ONLY):
            raise ValueError(
                f"--{given[0]} needs the diffusion decoder, but {config.model} has no block size and mask token in its "
                "config.json; --decoder diffusion insists"
            )
        return None
    if given := config.given(AR_ONLY):
        raise ValueError(
            f"--{given[0]} needs the autoregressive decoder, but {config.model} was trained for diffusion; "
            "--decoder ar insists"
        )
    if model.mask_id is None:
        raise ValueError(
            f"--decoder diffusion: {config.model} has no mask_token_id in its config.json; give --mask-id, it is not "
            "guessed"
        )
    from jaxmodels.decoding.block_diffusion.generation import BlockDecoding

    decoding = BlockDecoding.for_model(
        model,
        block_length=config.block_length,
        prompt_attention=config.prompt_attention,
        confidence=config.confidence,
        infill=infill,
    )
    options: dict[str, Any] = {"decoding": decoding, "align_blocks": config.align_blocks, "fused": config.fused}
    if config.live:
        from infer.text.live import BlockView

        options["on_step"] = BlockView(pretrained.tokenizer)
    return options


def _stream(config: Text, engine: "TextEngine", request: Request, *, keep: bool) -> Completion | None:
    """Runs one request, printing its text as it comes (unless --json) and what it cost; returns the whole if `keep`.

    A stream that nobody keeps may go on for ever.
    """
    from infer.text.engine import join_events

    job = engine.prepare(request)
    if not config.json and job.first_hole:
        sys.stdout.write(engine.tokenizer.decode(job.prompt[: job.first_hole].tolist()))
    events: list[Event] = []
    try:
        for event in engine.generate([job]):
            if keep or event.finish_reason is not None:
                events.append(event)
            if not config.json:
                sys.stdout.write(event.text)
                sys.stdout.flush()
    finally:  # also after Ctrl-C, so that what follows starts a line of its own
        if not config.json:
            print(flush=True)
    if not config.quiet:
        note(_statistics(events[-1]))
    if not keep:
        return None
    completion = join_events(events)
    if config.json:
        print(json.dumps(_record(None, completion, job, engine.tokenizer), ensure_ascii=False), flush=True)
    return completion


def _statistics(last: Event) -> str:
    usage = last.usage
    assert usage is not None  # of the last event
    line = (
        f"[{usage.prompt_tokens} prompt tokens in {usage.prefill_seconds:.2f} s, {usage.new_tokens} new"
        f" ({last.finish_reason}), {usage.tokens_per_second:.1f} tokens/s"
    )
    if usage.forwards and usage.forwards != usage.decode_tokens:
        line += f", {usage.tokens_per_forward:.2f} tokens per forward"
    return line + "]"


def _record(key: str | None, completion: Completion, job: Job, tokenizer: Any) -> dict[str, Any]:
    """A result line. Where a text cannot say which token it is, there are ids."""
    record: dict[str, Any] = {} if key is None else {"id": key}
    record |= {
        "text": completion.text,
        "ids": list(completion.tokens),
        "finish_reason": completion.finish_reason,
        "usage": completion.usage.to_json(),
    }
    if completion.logprobs is not None:
        record["logprobs"] = list(completion.logprobs)
    if completion.top_logprobs is not None:

        def alternative(token: int, logprob: float) -> dict[str, Any]:
            text = {} if tokenizer is None else {"text": tokenizer.decode([token], skip_special_tokens=False)}
            return {"id": token, "logprob": logprob, **text}

        record["top_logprobs"] = [[alternative(*pair) for pair in pairs] for pairs in completion.top_logprobs]
    if job.first_hole is not None and tokenizer is not None:
        record["prefix"] = tokenizer.decode(job.prompt[: job.first_hole].tolist())
        record["fills"] = [tokenizer.decode(completion.tokens[a:b]) for a, b in _holes(job)]
    return record


def _holes(job: Job) -> list[tuple[int, int]]:
    """Where the holes begin and end among the tokens that are given out."""
    asked = [token == job.prompt[job.first_hole] for token in job.prompt[job.first_hole :].tolist()] + [False]
    begins = [i for i, hole in enumerate(asked) if hole and not (i and asked[i - 1])]
    return [(i, asked.index(False, i)) for i in begins]


def _run_conversation(config: Text) -> int:
    """Turns from standard input, one a line, until it ends."""
    pretrained = _load(config)
    if pretrained.tokenizer is None:
        raise ValueError(f"{config.model}: has no tokenizer.json, which --chat needs")
    engine = _engine(config, pretrained, [], batch=1)
    turns: list[str] = []
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            return 0
        text = _decode(line, "standard input").strip()
        if not text:
            continue
        turns.append(text)
        request = Request(messages=_conversation(config, *turns), **config.defaults())
        completion = _stream(config, engine, request, keep=True)
        assert completion is not None
        turns.append(completion.text)


def _run_jsonl(config: Text) -> int:
    """Many requests. A request that cannot be run gets an "error" line, and makes the exit code 1."""
    from jaxmodels.checkpoints.huggingface import write_json

    assert config.jsonl is not None
    try:
        with sys.stdin.buffer if str(config.jsonl) == "-" else config.jsonl.open("rb") as lines:
            requests = read_requests(lines, str(config.jsonl), config.defaults())
    except OSError as error:
        raise ValueError(f"--jsonl {config.jsonl}: {error.strerror}") from None
    try:
        output = nullcontext() if config.out is None else ResultFile(config.out)
    except OSError as error:
        raise ValueError(f"--out {config.out}: {error.strerror}") from None
    with output as results:
        if results is not None:
            write_json(results.path.with_name(results.path.name + ".config.json"), to_json(config))
            total = len(requests)
            requests = [(key, request) for key, request in requests if key not in results.done]
            if len(requests) < total and not config.quiet:
                note(f"{total - len(requests)} of {total} requests have a result in {config.out}")
        if not requests:
            return 0

        def write(record: dict[str, Any]) -> None:
            if results is None:
                print(json.dumps(record, ensure_ascii=False), flush=True)
            else:
                results.append(record)

        return _run_requests(config, requests, write)


def _run_requests(config: Text, requests: list[tuple[str, Request]], write: Any) -> int:
    from infer.text.engine import join_events

    engine = _engine(config, _load(config), [request for _, request in requests], batch=min(8, len(requests)), chunk=8)
    keys, jobs, failed = [], [], 0
    for key, request in requests:
        try:
            jobs.append(engine.prepare(request))
            keys.append(key)
        except ValueError as error:
            failed += 1
            write({"id": key, "error": str(error)})
    parts: list[list[Event]] = [[] for _ in jobs]
    tokens = finished = 0
    for event in engine.generate(jobs):
        parts[event.index].append(event)
        tokens += len(event.tokens)
        if event.finish_reason is not None:
            completion = join_events(parts[event.index])
            write(_record(keys[event.index], completion, jobs[event.index], engine.tokenizer))
            parts[event.index] = []
            finished += 1
            if not config.quiet:
                note(f"{finished} of {len(jobs)} requests, {tokens} tokens, {engine.elapsed:.1f} s")
    if failed:
        note(f'error: {failed} of {len(requests)} requests could not be run; see their "error"')
    return 1 if failed else 0
