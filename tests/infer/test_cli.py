"""The command line: help without JAX, exit codes, one-line errors, text, conversation, JSONL that resumes, env."""

import io
import json
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

import infer.__main__ as cli
from infer import env
from infer.text import cli as text_cli
from infer.text.jsonl import ResultFile
from jaxmodels import command_line
from jaxmodels.qwen.model import is_stacked
from pallas_kernels import compat, dispatch

SHORT = ["--max-new-tokens", "6", "--ignore-eos", "--capacity", "64"]


@pytest.fixture(autouse=True)
def no_side_effects(monkeypatch):
    """The command line sets up its process; here it shares one with other tests."""
    monkeypatch.setattr(command_line, "prepare_environment", lambda: None)


def run(capsys, *args):
    """(exit code, stdout, stderr)"""
    code = cli.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return code, out, err


def test_loaded_stacks_are_not_kept_beside_what_decoding_takes(tiny_directory):
    loaded = text_cli._load(text_cli.Text(model=str(tiny_directory), prompt="a", quiet=True))
    assert not is_stacked(loaded.params["layers"])


def stdin_of(monkeypatch, data: bytes, tty: bool = False):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: tty))


@pytest.mark.parametrize("task", [[], *([task.name] for task in cli.LINE.commands)])
def test_help_imports_nothing_heavy(task):
    code = (
        "import sys; from infer.__main__ import main; code = main(sys.argv[1:]);"
        "heavy = {'jax', 'jaxlib', 'flax', 'numpy', 'transformers', 'torch'} & sys.modules.keys();"
        "assert code == 0 and not heavy, (code, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code, *task, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage: python -m infer" in done.stdout
    assert "JAX_COMPILATION_CACHE_DIR" in done.stdout or task not in ([], ["text"])


def test_every_flag_is_documented(capsys):
    code, out, _ = run(capsys, "text", "--help")
    assert code == 0
    undocumented = [line for line in out.splitlines() if line.strip().startswith("│ --") and line.count("  ") < 1]
    assert not undocumented
    for flag in ("--model", "--prompt", "--chat", "--jsonl", "--out", "--top-p", "--seed", "--chunk", "--stop"):
        assert flag in out


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "usage: python -m infer TASK"),
        (["txet"], "task must be one of .*text, .*env.*did you mean 'text'"),
        (["text"], "model"),
        (["text", "--model", "m", "--tempreature", "1"], "tempreature"),
        (["text", "--model", "m", "--top-k", "many"], "many"),
        (["text", "--model", "m", "--prompt", "a", "--jsonl", "b"], "--prompt cannot be combined with --jsonl"),
        (["text", "--model", "m", "--out", "b"], "--out needs --jsonl"),
        (["text", "--model", "m", "--prompt", "a", "--system", "b"], "--system needs --chat"),
        (["text", "--model", "m", "--prompt", "a", "--logprobs"], "--logprobs needs --json or --jsonl"),
        (["text", "--model", "m", "--prompt", "a", "--batch", "0"], "--batch must be at least 1; got 0"),
    ],
    ids=str,
)
def test_usage_errors_exit_with_2(capsys, args, message):
    import re

    code, out, err = run(capsys, *args)
    assert code == 2 and out == ""
    assert re.search(message, " ".join(err.split()))


@pytest.mark.parametrize(
    "args, message",
    [
        (["--model", "/nowhere/model", "--prompt", "a"], "nowhere"),
        (["--prompt", "", *SHORT], "the prompt is empty; give at least one token"),
        (["--prompt", "x" * 65, *SHORT], "the prompt has 65 tokens, more than the cache capacity 64"),
        (["--prompt", "a", "--temperature", "-1", *SHORT], "temperature must be >= 0; got -1.0"),
        (["--prompt", "a", "--capacity", "9999"], "capacity 9999 exceeds the model's 256 positions"),
        (["--jsonl", "/nowhere.jsonl"], "--jsonl /nowhere.jsonl: No such file or directory"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_failures_exit_with_1_and_one_line(capsys, tiny_directory, args, message):
    if "--model" not in args:
        args = ["--model", tiny_directory, *args]
    code, out, err = run(capsys, "text", *args, "--quiet")
    assert code == 1 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_a_prompt_streams_to_stdout(capsys, tiny_directory, monkeypatch):
    code, out, err = run(capsys, "text", "--model", tiny_directory, "--prompt", "hello", *SHORT)
    assert code == 0 and out.endswith("\n") and len(out) > 2
    assert "loading" in err and "compiling prefill 32 … " in err and "compiling decode … " in err
    assert "5 prompt tokens" in err and "6 new (length)" in err
    args = ["text", "--model", tiny_directory, *SHORT, "--quiet"]
    code, again, err = run(capsys, *args, "--prompt", "hello", "--json", "--logprobs")
    record = json.loads(again)
    assert (code, err, record["text"] + "\n") == (0, "", out)
    assert len(record["ids"]) == len(record["logprobs"]) == record["usage"]["new_tokens"] == 6
    stdin_of(monkeypatch, b"hello\n")
    assert run(capsys, *args)[:2] == (0, out)
    stdin_of(monkeypatch, b"\xff\xfe")
    assert run(capsys, *args) == (1, "", "error: standard input: not UTF-8 (invalid start byte at byte 0)\n")
    stdin_of(monkeypatch, b"", tty=True)
    code, _, err = run(capsys, *args)
    assert code == 2 and "give --prompt" in err


def test_a_conversation_remembers(capsys, tiny_directory, tiny, monkeypatch):
    stdin_of(monkeypatch, b"hi\n\nwhat?\n")
    args = ["--chat", "--system", "be", "--json", "--quiet", *SHORT, "--max-new-tokens", "2"]
    code, out, _ = run(capsys, "text", "--model", tiny_directory, *args)
    first, second = (json.loads(line) for line in out.splitlines())
    assert code == 0
    history = [("system", "be"), ("user", "hi"), ("assistant", first["text"]), ("user", "what?")]
    ids = tiny.tokenizer.chat([{"role": role, "content": content} for role, content in history])
    assert second["usage"]["prompt_tokens"] == len(ids)


def test_jsonl_runs_resume(capsys, tiny_directory, tmp_path, monkeypatch):
    """Interrupted by a full disk after two results, the same command gives what an uninterrupted run gives."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"id": f"r{i}", "prompt": "ab" * (i + 1), "seed": i, "temperature": 1.0} for i in range(5)]
    source.write_text("\n".join(json.dumps(line) for line in lines))
    args = ["text", "--model", tiny_directory, "--jsonl", source, "--batch", "2", "--chunk", "2", *SHORT]

    code, direct, err = run(capsys, *args)
    expected = {record["id"]: record["ids"] for record in map(json.loads, direct.splitlines())}
    assert code == 0 and sorted(expected) == [f"r{i}" for i in range(5)]
    assert "5 of 5 requests" in err

    append, count = ResultFile.append, [0]

    def fails_the_third_time(self, record):
        count[0] += 1
        if count[0] == 3:
            raise OSError(28, "No space left on device")
        append(self, record)

    monkeypatch.setattr(ResultFile, "append", fails_the_third_time)
    code, _, err = run(capsys, *args, "--out", out, "--quiet")
    assert code == 1 and "No space left on device" in err and len(out.read_text().splitlines()) == 2
    code, _, err = run(capsys, *args, "--out", out)
    assert code == 0 and "2 of 5 requests have a result" in err
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {record["id"]: record["ids"] for record in records} == expected and len(records) == 5
    settings = json.loads((tmp_path / "out.jsonl.config.json").read_text())
    assert (settings["model"], settings["batch"], settings["out"]) == (str(tiny_directory), 2, str(out))
    assert run(capsys, *args, "--out", out, "--quiet") == (0, "", "")  # nothing left: no model is loaded


def test_one_impossible_request_does_not_stop_the_others(capsys, tiny_directory, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": ""}\n{"prompt": "b"}\n')
    code, _, err = run(
        capsys,
        "text",
        "--model",
        tiny_directory,
        "--jsonl",
        source,
        "--out",
        out,
        "--batch",
        "2",
        "--chunk",
        "2",
        *SHORT,
        "--quiet",
    )
    records = {record["id"]: record for record in map(json.loads, out.read_text().splitlines())}
    assert code == 1 and "error: 1 of 3 requests could not be run" in err
    assert records["2"] == {"id": "2", "error": "the prompt is empty; give at least one token"}
    assert len(records["1"]["ids"]) == len(records["3"]["ids"]) == 6


def test_a_window_and_alternatives(capsys, tiny_directory):
    """A prompt of 300 tokens, more than the model has positions, with a cache of 24."""
    args = ["--prompt", "0123456789" * 30, "--window", "20", "--max-new-tokens", "6", "--ignore-eos", "--quiet"]
    code, out, _ = run(capsys, "text", "--model", tiny_directory, *args, "--json", "--top-logprobs", "2")
    record = json.loads(out)
    assert code == 0 and record["usage"]["prompt_tokens"] == 300 and len(record["ids"]) == 6
    for token, pairs in zip(record["ids"], record["top_logprobs"], strict=True):
        assert len(pairs) == 2 and pairs[0]["id"] == token and pairs[0]["logprob"] >= pairs[1]["logprob"]
        assert isinstance(pairs[0]["text"], str)
    code, again, _ = run(capsys, "text", "--model", tiny_directory, *args, "--prefill-chunk", "16")
    assert (code, again) == (0, record["text"] + "\n")


@pytest.mark.slow  # 15 s; last passed on 2026-11-27
def test_infilling(capsys, tiny_diffusion_directory, tmp_path):
    model = ["text", "--model", tiny_diffusion_directory, "--quiet", "--capacity", "64"]
    code, out, _ = run(capsys, *model, "--infill", "--prompt", "ab<fill:3>cd<fill:2>")
    assert code == 0 and out.startswith("ab") and "cd" in out
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "ab<fill:3>cd<fill:2>", "infill": true}\n{"prompt": "ab", "max_new_tokens": 3}\n')
    code, lines, _ = run(capsys, *model, "--jsonl", source)
    record, plain = sorted(map(json.loads, lines.splitlines()), key=lambda record: record["id"])
    assert code == 0 and record["prefix"] == "ab" and "fills" not in plain and len(plain["ids"]) <= 3
    assert record["fills"][0] + "cd" + record["fills"][1] == record["text"] and out == "ab" + record["text"] + "\n"
    refused = [("ab", "the prompt has no hole; write <fill:N>"), ("a<fill:0>", "at least one token")]
    refused += [(f"a<fill:{'9' * count}>", "at most 1,048,576; got <fill:9") for count in (7, 5000)]
    for prompt, message in refused:
        code, _, err = run(capsys, *model, "--infill", "--prompt", prompt)
        assert code == 1 and message in err


@pytest.mark.slow  # many programs to compile
def test_a_model_without_a_mask_token_needs_its_id(capsys, tiny_diffusion_directory, tmp_path):
    directory = tmp_path / "relative"
    shutil.copytree(tiny_diffusion_directory, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "mask_token_id"}))
    args = ["--prompt", "a", "--max-new-tokens", "3", "--quiet"]
    code, _, err = run(capsys, "text", "--model", directory, "--decoder", "diffusion", *args)
    assert code == 1 and "field 'mask_token_id' is missing" in err and "--mask-id" in err
    code, out, _ = run(capsys, "text", "--model", directory, "--mask-id", "2", *args)
    assert (code, out) == run(capsys, "text", "--model", tiny_diffusion_directory, *args)[:2]
    code, _, err = run(capsys, "text", "--model", directory, "--mask-id", "260", *args)
    assert code == 1 and "mask_id must lie in [0, vocab_size=260); got 260" in err


def test_calibrating_a_threshold(capsys, tiny_diffusion_directory, tiny_directory, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"prompt": "line {i}", "answer": "a"}}\n' for i in range(4)))
    args = ["calibrate-threshold", "--model", tiny_diffusion_directory, "--max-new-tokens", "8", "--data", data]
    args += ["--batch", "2", "--thresholds", "0", "1"]
    code, out, err = run(capsys, *args, "--tolerance", "1", "--json")
    record = json.loads(out)
    one, sure, blind = record["trials"]
    assert code == 0 and record["threshold"] == 0 and record["prompts"] == 4
    assert (one["threshold"], one["quality"], one["tokens_per_step"]) == (None, 1.0, 1.0)
    assert (sure["threshold"], sure["loss"]) == (1.0, 0.0)
    assert blind["threshold"] == 0 and blind["loss"] > 0 and blind["tokens_per_step"] > 2
    assert "threshold 0: " in err
    code, out, _ = run(capsys, *args, "--tolerance", "0", "--quiet")
    assert code == 0 and "no threshold loses at most 0: decode one token per pass" in out
    code, out, _ = run(capsys, *args, "--tolerance", "9", "--quiet", "--score", "judge", "--judge", tiny_directory)
    assert code == 0 and out.splitlines()[-1].endswith("chosen")
    code, out, _ = run(capsys, *args, "--tolerance", "1", "--quiet", "--score", "answer", "--json")
    assert code == 0 and 0 <= json.loads(out)["trials"][0]["quality"] <= 1


@pytest.mark.parametrize(
    ("line", "flags", "code", "message"),
    [
        ("", [], 1, "holds no request"),
        ('{"prompt": "a", "options": {"threshold": 1}}', [], 1, "line 1: options are what is calibrated"),
        ('{"prompt": "a"}', ["--score", "answer"], 1, "line 1: answer must be a string that is not empty; got None"),
        ('{"prompt": 3}', [], 1, "line 1: prompt must be a string; got 3"),
        ("{", [], 1, "line 1: not JSON"),
        ('{"prompt": "a"}', ["--score", "judge"], 2, "--judge and --score judge belong together"),
        ('{"prompt": "a"}', ["--thresholds", "2"], 2, "--thresholds must lie in [0, 1]; got (2.0,)"),
        ('{"prompt": "a"}', ["--tolerance", "-1"], 2, "--tolerance must not be negative; got -1.0"),
    ],
)
def test_calibration_refuses_what_it_cannot_use(capsys, tmp_path, line, flags, code, message):
    data = tmp_path / "data.jsonl"
    data.write_text(line + "\n")
    args = ["calibrate-threshold", "--model", "/nowhere", "--data", data, "--tolerance", "1", *flags]
    got, out, err = run(capsys, *args)
    assert (got, out) == (code, "") and message in " ".join(err.split())


def test_a_closed_pipe_is_no_traceback():
    command = f"{sys.executable} -m infer text --help | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr


@pytest.mark.parametrize("end", ["ctrl-c", "closed pipe"])
def test_an_endless_stream_ends_without_a_traceback(tiny_directory, end):
    flags = ["--prompt", "on", "--window", "16", "--max-new-tokens", "1000000000", "--ignore-eos"]
    # A shell may have started the tests in the background, where SIGINT is ignored, also by every process they start.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from infer.__main__ import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "text", "--model", str(tiny_directory), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert len(process.stdout.read(50)) == 50
        if end == "ctrl-c":
            process.send_signal(signal.SIGINT)
            rest, err = process.communicate(timeout=300)
            assert rest.endswith(b"\n") and err.decode().splitlines()[-1] == "error: interrupted"
        else:
            process.stdout.close()
            err = process.stderr.read()
        assert process.wait(timeout=300) == 1 and b"Traceback" not in err
    finally:
        process.kill()
        process.stderr.close()
        process.stdout.close()
        process.wait()


def break_model(directory, what):
    weights = directory / "model.safetensors"
    if what == "no config":
        (directory / "config.json").unlink()
    elif what == "no tokenizer":
        (directory / "tokenizer.json").unlink()
    elif what == "no weights":
        weights.unlink()
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "no header":
        weights.write_bytes(weights.read_bytes()[:5])
    elif what == "config":
        (directory / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no config", "has no config.json"),
        ("no tokenizer", "this checkpoint has none, give token ids"),
        ("no weights", "safetensors"),
        ("truncated", "model.safetensors"),
        ("no header", "model.safetensors"),
        ("config", "config.json"),
    ],
)
def test_a_damaged_model_is_one_line(capsys, tiny_directory, tmp_path, what, message):
    directory = tmp_path / "model"
    shutil.copytree(tiny_directory, directory)
    break_model(directory, what)
    code, out, err = run(capsys, "text", "--model", directory, "--prompt", "a", "--quiet")
    assert (code, out) == (1, "") and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_an_output_that_cannot_be_written_is_found_before_the_model_is_loaded(capsys, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a"}\n')
    for out in (tmp_path, source / "out.jsonl", "/proc/none/out.jsonl"):
        code, text, err = run(capsys, "text", "--model", "/nowhere", "--jsonl", source, "--out", out)
        assert (code, text) == (1, "") and err.startswith(f"error: --out {out}: ") and err.count("\n") == 1


def test_env_reports_versions_devices_and_kernels(capsys):
    code, out, _ = run(capsys, "env", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["packages"]["jax"] and report["devices"][0]["platform"] in ("cpu", "gpu")
    assert report["kernels"]["flash_attention reference"] == "available by name"
    for op in ("flash_attention", "decode_attention"):
        states = [state for name, state in report["kernels"].items() if name.startswith(op)]
        assert states.count("active") == 1
        assert all(s in ("active", "available by name") or s.startswith("not active: ") for s in states)


def test_env_tells_what_the_automatic_choice_takes_and_why_not(monkeypatch):
    """As on a Hopper GPU, with a table where the kernel wins with gradients only and decoding was never checked."""
    kinds = {"forward": [], "gradients": ["Causal bfloat16 128/128"]}
    point = {"kind": "Causal bfloat16 128/128", "sizes": {"queries": 4096, "keys": 4096, "work": 2**17}}
    timed = [
        point | {"gradients": taken, "ms": {"mosaic": 2.0, "xla": 3.0 if taken else 1.0}} for taken in (False, True)
    ]
    table = {"flash_attention": {"fast": {"checked": {"mosaic": kinds}, "timed": timed}}}
    others = ("quantized_matmul", "pairwise_rotation", "norm_rope", "moba_attention")
    table |= {op: {} for op in ("decode_attention", *others)}
    monkeypatch.setattr(dispatch, "table", lambda: table)
    device = SimpleNamespace(platform="gpu", device_kind="fast", compute_capability="9.0")
    monkeypatch.setattr(dispatch, "default_device", lambda: device)
    monkeypatch.setattr(compat, "missing_hopper", lambda: None)
    report = env.kernels()
    assert report["flash_attention mosaic"] == "active with gradients"
    assert report["flash_attention xla"] == "active without gradients"
    assert report["flash_attention cudnn"].startswith("not active: cuDNN needs an NVIDIA GPU")
    assert report["decode_attention xla"] == "active"
    assert report["decode_attention mosaic"] == "available by name: nothing is measured on fast"
    assert report["decode_attention reference"] == "available by name"
    for op in others:
        assert report[f"{op} mosaic"] == "available by name: nothing is measured on fast"


def test_env_in_words(capsys):
    code, out, _ = run(capsys, "env")
    assert code == 0 and "kernels" in out and "compilation cache" in out
