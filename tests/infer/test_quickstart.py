"""The quickstart from end to end with a tiny random pair, its prompts, numbers, replay and picture."""

import io
import json
import math
import platform
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import rich.console

from infer import quickstart
from infer.__main__ import main
from infer.quickstart import Arm, Pair, Quickstart, common_share, judge, load_prompts, score
from infer.replay import MASKED, Replay
from jaxmodels import save_pretrained
from jaxmodels.decoding.block_diffusion import exact_nelbo
from jaxmodels.demo.completions import PromptCut
from jaxmodels.demo.corpus import PYTHON_VERSION, stdlib_directory
from jaxmodels.demo.prompts import CodePrompt, read_prompts
from jaxmodels.qwen import QwenConfig, build

BLOCK, POSITIONS = 4, 96
NEW = POSITIONS // 4


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny) -> Path:
    """ar/ and dlm/ with a byte-level tokenizer and large random weights, so that choices are decided."""
    root = tmp_path_factory.mktemp("pair")
    for seed, (name, block) in enumerate((("ar", None), ("dlm", BLOCK))):
        lm = build(
            QwenConfig.tiny(
                vocab_size=260, layers=2, dim=32, mlp_dim=64, head_dim=16, eos_ids=(1,), pad_id=0, mask_id=2,
                max_positions=POSITIONS, block_size=block,
            )
        )  # fmt: skip
        params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, lm.init(jax.random.key(seed)))
        save_pretrained(root / name, lm, params, tokenizer=tiny.tokenizer)
    return root


@pytest.fixture(scope="module")
def pair(models) -> Pair:
    return Pair.load(Quickstart(models=models))


@pytest.fixture(scope="module")
def prompts(pair) -> list[CodePrompt]:
    return load_prompts(pair.tokenizer, 3, max_tokens=pair.prompt_tokens, multiple=pair.block, directory=None)[0]


@pytest.mark.smoke
def test_piped_run_streams_compares_and_draws(models, tmp_path, capsys):
    picture = tmp_path / "pictures" / "trade-off.png"
    flags = ["--models", str(models), "--picture", str(picture), "--prompts", "2", "--show", "1", "--draws", "2"]
    assert main(["quickstart", *flags, "--thresholds", "0.5", "0.9"]) == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out and MASKED not in out, "a pipe gets plain text without frames"
    assert "held-out file glob.py" in out and "per forward, " in out and str(picture) in out
    lines = out[out.index("one token at a time against") :].splitlines()
    starts = [next(i for i, line in enumerate(lines) if name in line) for name in ("autoregressive", "one a pass")]
    starts += [next(i for i, line in enumerate(lines) if f"diffusion, {t}" in line) for t in (0.9, 0.5, "budget 0.4")]
    assert starts == sorted(starts) and "…" not in "".join(lines[: starts[-1]]), "all columns fit 80 characters"
    assert "≤" in lines[starts[1]] and "exact" in out and "budget 0.4: the surest of the first 6 open tokens" in out
    assert "s in all" in err and "s in all" not in out

    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    assert pixels.shape[1] > 1000 and 0.01 < (pixels.min(axis=-1) < 0.9).mean() < 0.5


def test_json_holds_numbers_that_agree_with_each_other(models, capsys):
    flags = ["--models", str(models), "--picture", "None", "--prompts", "2", "--show", "2", "--draws", "0", "--json"]
    assert main(["quickstart", *flags, "--thresholds", "0"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["picture"] is None and report["likelihood"] is None
    assert (report["prompts"], report["new_tokens"], report["block_size"]) == (2, NEW, BLOCK)
    assert list(report["arms"]) == ["ar", "one token a pass", "threshold 0", "budget 0.4"]
    assert report["arms"]["budget 0.4"]["reveal"] == {"budget": 0.4, "lookahead": 6}
    for arm in report["arms"].values():
        assert arm["tokens_per_forward"] == arm["tokens"] / arm["forwards"]
        # Two completions: the median of their speeds lies near the speed of both together.
        assert 0.2 < arm["tokens_per_second"] / (arm["tokens"] / arm["seconds"]) < 5
    assert report["arms"]["ar"]["agreement"] is None
    assert [c["path"] for c in report["completions"]] == list(quickstart.FILES[:2])
    assert all(c["forwards"] <= len(c["tokens"]) <= NEW for c in report["completions"])


def test_help_needs_no_jax():
    code = (
        "import sys\nfrom infer.__main__ import main\n"
        "assert main(['quickstart', '--help']) == 0\nassert 'jax' not in sys.modules, 'help imported jax'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for flag in ("--models", "--picture", "--thresholds", "--json", "--pause"):
        assert flag in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompts", "17"], r"prompts must lie in 1..16; got 17"),
        (["--show", "5", "--prompts", "4"], r"show must lie in 0..prompts = 4; got 5"),
        (["--thresholds", "1.5"], r"thresholds must lie in \[0, 1\]"),
        (["--draws", "1"], r"draws must be 0 or at least 2"),
        (["--pause", "-1"], r"pause must not be negative"),
    ],
)
def test_wrong_flags_are_usage_errors(flags, message, capsys):
    import re

    assert main(["quickstart", *flags]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_missing_models_and_pairs_that_do_not_fit(models, tmp_path, capsys):
    assert main(["quickstart", "--models", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "ar" / "config.json") in error and "--models" in error
    two_ar = tmp_path / "two"
    two_ar.mkdir()
    for name in ("ar", "dlm"):
        (two_ar / name).symlink_to(models / "ar")
    with pytest.raises(ValueError, match="no block_size"):
        Pair.load(Quickstart(models=two_ar))
    with pytest.raises(ValueError, match=f"need 100 positions; the models have {POSITIONS}"):
        Pair.load(Quickstart(models=models, prompt_tokens=80, new_tokens=17))
    with pytest.raises(ValueError, match="prompt_tokens must be at least a block"):
        Pair.load(Quickstart(models=models, prompt_tokens=3))


def test_prompts_are_the_same_without_the_library(pair, tmp_path):
    if platform.python_version() != PYTHON_VERSION:
        pytest.skip(f"the excerpts are those of Python {PYTHON_VERSION}")
    options = {"max_tokens": pair.prompt_tokens, "multiple": pair.block}
    own, taken = load_prompts(pair.tokenizer, 16, directory=None, **options)
    assert not taken and [p.cut.path for p in own] == list(quickstart.FILES)
    assert all(len(p.ids) == 48 and p.cut.context.endswith(pair.tokenizer.decode(p.ids)) for p in own)
    shipped, taken = load_prompts(pair.tokenizer, 16, directory=tmp_path, **options)
    assert shipped == own and taken == quickstart.FILES
    # A file that differs by one byte is not used either.
    (tmp_path / "glob.py").write_bytes((stdlib_directory() / "glob.py").read_bytes() + b"#")
    assert "glob.py" in load_prompts(pair.tokenizer, 1, directory=tmp_path, **options)[1]
    (tmp_path / "glob.py").write_bytes((stdlib_directory() / "glob.py").read_bytes())
    assert not load_prompts(pair.tokenizer, 1, directory=tmp_path, **options)[1]


def test_excerpts_are_what_their_maker_gives(tmp_path):
    if platform.python_version() != PYTHON_VERSION:
        pytest.skip(f"the excerpts are those of Python {PYTHON_VERSION}")
    quickstart.write_excerpts(tmp_path / "prompts.jsonl")
    assert read_prompts(tmp_path / "prompts.jsonl") == read_prompts(quickstart.ASSETS / quickstart.EXCERPTS)


def test_note_when_prompts_come_with_the_package(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jaxmodels.demo.corpus.stdlib_directory", lambda: tmp_path)
    flags = ["--models", str(models), "--picture", "None", "--prompts", "1", "--show", "0", "--draws", "0"]
    assert main(["quickstart", *flags, "--thresholds", "0.5"]) == 0
    assert "1 of 1 prompts come with the package" in capsys.readouterr().err


def test_thresholds_share_one_program_and_cost_what_they_say(pair, prompts):
    ids = prompts[0].ids
    outcomes = {t: pair.run_dlm(ids, {} if t is None else {"threshold": t}) for t in (None, 0.9, 0.5, 0.0)}
    outcomes["budget"] = pair.run_dlm(ids, {"budget": 0.4, "lookahead": 2})
    programs = pair.stream._programs
    compiled = [program._cache_size() for program in (programs.prefill, programs.first_guess, programs.fused)]
    assert compiled == [1, 1, 1], "thresholds are traced: one program for all, also for the first call"
    for tokens, forwards, seconds in outcomes.values():
        assert 0 < len(tokens) <= pair.new_tokens and seconds > 0 and forwards <= len(tokens)
    if len(outcomes[None][0]) == pair.new_tokens:  # no early end: whole blocks
        assert outcomes[None][1] == pair.new_tokens
        assert outcomes[0.0][1] == pair.new_tokens // BLOCK
    tokens, forwards, _ = pair.run_ar(ids)
    assert forwards == len(tokens), "one token per forward, the first one by the prefill"
    logits = pair.ar.lm.apply(pair.ar.params, jnp.asarray([[*ids, *tokens[:-1]]], jnp.int32))[0, len(ids) - 1 :]
    assert tokens == jnp.argmax(logits, axis=-1).tolist()


@pytest.mark.slow  # many programs to compile
def test_likelihoods_equal_a_direct_computation(pair, prompts):
    few = prompts[:2]
    result = score(pair, few, draws=32)
    nats, count, size = 0.0, 0, 0
    for prompt in few:
        following = pair.tokenizer.encode(prompt.following, add_special_tokens=False)[
            : pair.positions - len(prompt.ids)
        ]
        ids = jnp.asarray([*prompt.ids, *following], jnp.int32)
        logp = jax.nn.log_softmax(pair.ar.lm.apply(pair.ar.params, ids[None])[0])
        nats -= float(sum(logp[i - 1, ids[i]] for i in range(len(prompt.ids), len(ids))))
        count, size = count + len(following), size + len(pair.tokenizer.decode(following).encode())
    assert (result.tokens, result.bytes) == (count, size)
    assert result.ar == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    truth = 0.0
    for prompt in few:
        following = pair.tokenizer.encode(prompt.following, add_special_tokens=False)
        ids = jnp.asarray([[*prompt.ids, *following][: pair.positions]], jnp.int32)
        mask = jnp.arange(ids.shape[1])[None] >= len(prompt.ids)
        truth += float(exact_nelbo(pair.dlm.lm, pair.dlm.params, ids, block_size=BLOCK, loss_mask=mask).nats[0])
    assert result.error > 0 and abs(result.bound - truth / math.log(2) / size) < 4 * result.error


def test_judge_counts_valid_completions_and_agreement(tiny):
    prompt = CodePrompt((), PromptCut("f.py", "def f(x):\n    y = x"), "")
    good = tiny.tokenizer.encode("\n    z = 1\n    w = 2\n    return z\n", add_special_tokens=False)
    bad = [*good[:9], *tiny.tokenizer.encode("(]\n", add_special_tokens=False)]
    arms = [Arm("ar", {}), Arm("one token a pass", {}), Arm("threshold 0.5", {"threshold": 0.5})]
    for arm, completions in zip(arms, ([bad, bad], [good, good], [good, bad]), strict=True):
        for tokens in completions:
            arm.add(tokens, forwards=4, seconds=0.5)
        arm.add(good, forwards=4, seconds=50.0)  # something else ran
    judge(arms, [prompt] * 3, tiny.tokenizer)
    assert [arm.valid for arm in arms] == [1, 3, 2]
    assert arms[0].agreement is None and arms[1].agreement == 1.0
    assert arms[2].agreement == pytest.approx((1 + 9 / len(good) + 1) / 3)
    assert arms[1].tokens_per_forward == len(good) / 4 and arms[1].tokens_per_second == 2 * len(good)
    assert common_share([], []) == 1.0 and common_share([1, 2], [1, 2, 3, 4]) == 0.5 and common_share([1], [2]) == 0.0


def replayed(tiny, blocks, **options) -> str:
    console = rich.console.Console(file=io.StringIO(), width=60, highlight=False, **options)
    with Replay(console, tiny.tokenizer, pause=0.0) as replay:
        for tokens, reveal in blocks:
            replay.block(tokens, reveal)
    return console.file.getvalue()


def test_replay_prints_the_text_and_on_a_terminal_each_pass(tiny):
    text = "\n    naïve = 'a[bold]b'  \n\n" + "x" * 70 + "\n"
    ids = tiny.tokenizer.encode(text, add_special_tokens=False)
    ids += [-1] * (-len(ids) % 8)
    ids = [1 if i == -1 else i for i in ids]  # filled up with end tokens, which have no text
    blocks = [(ids[i : i + 8], [2, 0, 1, 1, 0, 2, 3, 1]) for i in range(0, len(ids), 8)]
    assert replayed(tiny, blocks) == text + "\n"
    frames = replayed(tiny, blocks[:1], force_terminal=True, color_system=None)
    assert frames.count(MASKED) == 6 + 3 + 1, "tokens still masked after the passes 0, 1 and 2"


def test_picture_marks_thresholds_and_recorded_results():
    from matplotlib.text import Text

    from infer.picture import SAME, make_figure

    arms = [Arm("ar", {}), Arm("one token a pass", {})]
    arms += [Arm(f"threshold {t}", {"threshold": t}) for t in (0.9, 0.5)] + [Arm("budget 0.4", {"budget": 0.4})]
    costs = ((64, 0.1), (64, 0.16), (30, 0.08), (20, 0.05), (25, 0.06))
    for arm, (forwards, seconds) in zip(arms, costs, strict=True):
        arm.add(range(64), forwards, seconds)
        arm.valid, arm.agreement = 1, 0.5
    results = {"ar": (1.0, 0.71), "dlm-one": (1.0, 0.7), "dlm-0.9": (2.1, 0.69), "dlm-0.5": (3.0, 0.6)}
    recorded = {
        "prompts": 2048,
        "arms": {
            name: {"tokens_per_forward": x, "valid": y, "valid_interval": [y - 0.02, y + 0.02]}
            for name, (x, y) in results.items()
        }
        | {"file": {"valid": 0.88, "valid_interval": [0.86, 0.9]}},
    }

    def texts(recorded):
        figure = make_figure(arms, 1, "test device", recorded)
        return {text.get_text() for text in figure.findobj(Text)}

    first, second = texts(recorded), texts(None)
    both = {"tokens per second", "tokens per forward pass", "one a pass", "0.9", "0.5", "budget 0.4", "autoregressive"}
    assert both <= first and both <= second
    assert any(text.startswith("test device") for text in first)
    assert any("2,048 prompts" in text for text in first) and any("(1 prompts" in text for text in second)
    assert "the files' own continuations" in first - second and SAME in second - first
    for arm in arms[1:]:  # models that reveal one token a pass at any threshold: one name for all points
        arm.forwards, arm.seconds = 64, [0.1]
    assert "one a pass, 0.9, 0.5, budget 0.4" in texts(None)
