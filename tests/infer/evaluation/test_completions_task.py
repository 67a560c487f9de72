"""The paired evaluation of completions: generation of both kinds, its files, and the judgement."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer.evaluation import completions as task
from infer.evaluation.completions import Completions, arms, generate_ar, generate_dlm, judge, results_table
from jaxmodels import load_pretrained, save_pretrained
from jaxmodels.decoding.complete import Completion
from jaxmodels.demo.completions import PromptCut
from jaxmodels.demo.corpus import Corpus
from jaxmodels.demo.prompts import CodePrompt, write_prompts
from jaxmodels.qwen import QwenConfig, build

BLOCK, NEW = 4, 8
CONTEXT = "def f(x):\n    y = x"
GOOD = "\n    z = 1\n    w = 2\n    return z\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny):
    root = tmp_path_factory.mktemp("pair")
    for seed, (name, block) in enumerate((("ar", None), ("dlm", BLOCK))):
        config = QwenConfig.tiny(
            vocab_size=260, layers=1, dim=32, mlp_dim=64, head_dim=16, eos_ids=(1,), pad_id=0, mask_id=2,
            max_positions=64, block_size=block,
        )  # fmt: skip
        lm = build(config)
        params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, lm.init(jax.random.key(seed)))
        save_pretrained(root / name, lm, params, tokenizer=tiny.tokenizer)
    return root


def config_for(models, output, **changes) -> Completions:
    options = {"count": 3, "prompt_tokens": 16, "new_tokens": NEW, "thresholds": (0.5,), "batch": 2}
    return Completions(ar=models / "ar", dlm=models / "dlm", output=output, **(options | changes))


@pytest.mark.slow  # 18 s; last passed on 2026-11-27
def test_rows_do_not_depend_on_batches_and_forwards_are_counted(models, tmp_path):
    prompts = [[4 + (i * 37 + j * 11) % 250 for j in range(16)] for i in range(3)]
    config = config_for(models, tmp_path)
    alone = config_for(models, tmp_path, batch=1)
    ar, dlm = load_pretrained(models / "ar"), load_pretrained(models / "dlm")
    batched = generate_ar(ar, prompts, config)
    assert batched == generate_ar(ar, prompts, alone) and len(batched) == 3
    for prompt, done in zip(prompts, batched, strict=True):
        assert done.forwards == len(done.tokens) <= NEW
        logits = ar.lm.apply(ar.params, jnp.asarray([[*prompt, *done.tokens[:-1]]], jnp.int32))[0, len(prompt) - 1 :]
        assert list(done.tokens) == jnp.argmax(logits, axis=-1).tolist()
    at_once = generate_dlm(dlm, prompts, config, threshold=0.0)
    one = generate_dlm(dlm, prompts, config)
    assert one == generate_dlm(dlm, prompts, alone)
    for fast, slow in zip(at_once, one, strict=True):
        if len(fast.tokens) == NEW:
            assert fast.forwards == NEW // BLOCK, "a block in one pass, commits fused"
        if len(slow.tokens) == NEW:
            assert slow.forwards == NEW


def test_task_continues_and_refuses_another_setting(models, tmp_path, tiny, monkeypatch, capsys):
    config = config_for(models, tmp_path, judge=False)
    prompt = CodePrompt(tuple(range(10, 26)), PromptCut("f.py", CONTEXT), GOOD)
    write_prompts(tmp_path / "prompts.jsonl", [prompt] * 3)
    assert task.main(config) == 0 and str(tmp_path) in capsys.readouterr().out
    files = {f.name for f in tmp_path.iterdir()}
    assert files == {"prompts.jsonl", "config.json", "tokens-ar.jsonl", "tokens-dlm-one.jsonl", "tokens-dlm-0.5.jsonl"}
    before = (tmp_path / "tokens-ar.jsonl").read_text()
    assert len(before.splitlines()) == 3

    def never(*_):
        raise AssertionError("generated again")

    monkeypatch.setattr(task, "generate_ar", never)
    monkeypatch.setattr(task, "generate_dlm", never)
    assert task.main(config) == 0
    with pytest.raises(ValueError, match="made with another new_tokens"):
        task.main(config_for(models, tmp_path, new_tokens=NEW + 1))
    (tmp_path / "tokens-ar.jsonl").write_text(before.splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="has 1 completions for 3 prompts; delete it"):
        task.main(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "count must be positive; got 0"),
        ({"batch": 0}, "batch must be positive; got 0"),
        ({"thresholds": (0.5, 1.1)}, r"thresholds must lie in \[0, 1\]"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        Completions(**changes)


def test_judgement_counts_valid_copied_and_broken(tiny, monkeypatch):
    encode = lambda text: tuple(tiny.tokenizer.encode(text, add_special_tokens=False))  # noqa: E731
    copy = "\n    first_name = 17\n    second_name = 34\n    return first_name\n"
    corpus = Corpus({"t.py": "def g(x):" + copy}, {"t.py": "train"}, (), ())
    monkeypatch.setattr("jaxmodels.demo.corpus.load_corpus", lambda: corpus)
    prompts = [CodePrompt((), PromptCut(f"{i % 2}.py", CONTEXT), GOOD) for i in range(4)]
    broken = encode("\n    z = (]\n    w = 2\n    return z\n")
    generated = {
        "ar": [Completion(encode(GOOD), 10)] * 4,
        "dlm-one": [Completion(encode(GOOD), 10)] * 2 + [Completion(broken, 10)] * 2,
        "dlm-0.5": [Completion(encode(copy), 5)] * 4,
    }
    results = judge(prompts, generated, tiny.tokenizer, new_tokens=200)
    assert (results["prompts"], results["files"]) == (4, 2) and "below 50%" in results["definition"]
    by = results["arms"]
    assert list(by) == ["ar", "dlm-one", "dlm-0.5", "file"]
    assert [by[arm]["valid"] for arm in by] == [1.0, 0.5, 0.0, 1.0]
    assert [by[arm]["copied"] for arm in by] == [0.0, 0.0, 1.0, 0.0]
    assert by["dlm-one"]["parses"] == 0.5 and by["dlm-0.5"]["parses"] == 1.0
    assert by["ar"]["tokens_per_forward"] == len(encode(GOOD)) / 10 and "tokens_per_forward" not in by["file"]
    mean, low, high = by["dlm-one"]["valid_minus_ar"]
    assert mean == -0.5 and low <= mean <= high and "valid_minus_ar" not in by["ar"]
    assert by["dlm-0.5"]["valid_minus_dlm-one"][0] == -0.5
    json.dumps(results)
    table = results_table(results)
    assert table.row_count == 4 and "4 prompts from 2" in table.title


def test_arms_always_hold_both_references():
    config = Completions(thresholds=(0.9, 0.5), factors=(1.0,), budgets=(0.5,))
    assert list(arms(config)) == ["ar", "dlm-one", "dlm-0.9", "dlm-0.5", "dlm-factor-1", "dlm-budget-0.5"]
    assert arms(config)["dlm-budget-0.5"] == ("dlm", {"budget": 0.5})
    near = arms(dataclasses.replace(config, lookahead=6))
    assert near["dlm-one"] == ("dlm", {}) and near["dlm-0.9-lookahead-6"] == ("dlm", {"threshold": 0.9, "lookahead": 6})
    assert len(near) == len(arms(config))
    assert np.all([kind == "dlm" for kind, _ in list(arms(config).values())[1:]])
