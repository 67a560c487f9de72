"""The recipe at the smallest size: what it writes, that it continues, and that it repeats itself."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.demo.corpus import Corpus
from train.ablation import arms, runs
from train.ablation.arms import ARMS, Arm, Decode
from train.data.rows import RowStore
from train.recipes import ablation
from train.recipes.ablation import Ablation


def source(name: str) -> str:
    return "".join(
        f"def {name}_{i}(value):\n    other = value + {i}\n    return other * value\n\n\n" for i in range(30)
    )


@pytest.fixture
def small(monkeypatch):
    """A small corpus, few arms, one block."""
    splits = {"a.py": "train", "b.py": "train", "c.py": "validation", "d.py": "test"}
    corpus = Corpus({name: source(name[0]) for name in splits}, splits, (), ())
    monkeypatch.setattr("jaxmodels.demo.corpus.load_corpus", lambda *_: corpus)
    monkeypatch.setattr("jaxmodels.demo.prompts.load_corpus", lambda *_: corpus)
    by_name = {arm.name: arm for arm in ARMS}
    few = (dataclasses.replace(by_name["lora-16"], decodes=(Decode(16),)), by_name["bidirectional"])
    monkeypatch.setattr(arms, "ARMS", few)
    monkeypatch.setattr(runs, "BLOCKS", (16,))
    monkeypatch.setattr(runs, "reveals", lambda new: {"4 tokens": runs.RevealOptions(steps=new // 4)})
    return few


@pytest.mark.slow  # a minute; last passed on 2026-11-26
def test_runs_are_written_once_and_repeat_exactly(small, compiled_programs, tmp_path, capsys):
    config = Ablation(
        directory=tmp_path, seeds=2, vocab_size=280, dim=64, layers=1, heads=1, kv_heads=1, mlp_dim=64, seq_len=64,
        cuts=1, batch_size=2, ar_steps=10, eval_rows=2, eval_samples=1, prompts=2, prompt_tokens=32, new_tokens=16,
        arms=("lora-16",), workers=1,
    )  # fmt: skip
    assert ablation.main(dataclasses.replace(config, limit_seconds=0.0)) == 1
    assert "2 runs were not started within 0 s" in capsys.readouterr().err
    assert not list((tmp_path / "runs").iterdir())

    assert ablation.main(config) == 0
    first, other = (json.loads((tmp_path / "runs" / f"run-{seed}-lora-16.json").read_text()) for seed in range(2))
    assert first["steps"] == 2 and set(first["bound"]) == {"16", "row"} and len(first["offsets"]) == 16
    assert first["drift"]["drift_attention"] > 0 and np.isfinite(first["train"]["loss"])
    assert first["decode"]["16"]["4 tokens"]["tokens_per_forward"] == pytest.approx(4.0, rel=0.3)
    assert first["bound"] != other["bound"]
    ar = json.loads((tmp_path / "ar-0.json").read_text())
    assert ar["steps"] == 10 and 0 < ar["nats"] < 2 * np.log(280)
    result = json.loads((tmp_path / "summary.json").read_text())
    assert result["values"]["bound/16"]["lora-16"][2] == result["ar_nats"][2] == 2
    assert result["values"]["16/4 tokens/valid"]["lora-16"][2] == 2
    assert "LoRA" in (tmp_path / "summary.md").read_text()

    # A lost record is made again and equal, from the stored model; what is there is left alone.
    kept = (tmp_path / "runs" / "run-0-lora-16.json").stat().st_mtime_ns
    (tmp_path / "runs" / "run-1-lora-16.json").unlink()
    capsys.readouterr()
    assert ablation.main(dataclasses.replace(config, store=tmp_path / "store", judge=False)) == 0
    assert "[1/1" in capsys.readouterr().err
    again = json.loads((tmp_path / "runs" / "run-1-lora-16.json").read_text())
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}
    assert (tmp_path / "runs" / "run-0-lora-16.json").stat().st_mtime_ns == kept

    with pytest.raises(ValueError, match=r"other settings \(dim\)"):
        ablation.main(dataclasses.replace(config, dim=128))
    with pytest.raises(ValueError, match="rows of 64 tokens of 280; this run needs seq_len 96"):
        ablation.main(dataclasses.replace(config, directory=tmp_path / "x", store=tmp_path / "store", seq_len=96))

    store = RowStore(tmp_path / "store", "test")
    rows = runs.Rows(store, max_rows=2)
    batch = runs.take(rows.arrays, jnp.asarray([1, 0]))
    for i, index in ((0, len(store) - 1), (1, 0)):
        for name, value in store[index].items():
            np.testing.assert_array_equal(batch[name][i], value)


def test_rows_are_taken_in_shuffled_passes():
    rows = object.__new__(runs.Rows)
    rows.arrays = {"tokens": np.zeros((5, 4))}
    order = rows.order(4, 3, seed=1)
    assert order.shape == (4, 3)
    flat = order.reshape(-1)
    assert sorted(flat[:5]) == sorted(flat[5:10]) == list(range(5)) and list(flat[:5]) != list(flat[5:10])
    assert (rows.order(4, 3, seed=2) != order).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("defualt",)}, "arms must be among default, .*; got defualt"),
        ({"seeds": 0}, "seeds must be at least 1; got 0"),
        ({"seq_len": 100}, "seq_len must be a multiple of 32; got 100"),
        ({"prompt_tokens": 448}, r"at most seq_len = 512; got 448 \+ 128"),
        ({"prompts": -1}, "prompts must not be negative; got -1"),
        ({"workers": 0}, "workers must be at least 1 or None; got 0"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        Ablation(**changes)


def test_arms_differ_from_the_default_in_one_choice():
    default = ARMS[0]
    for arm in ARMS[1:]:
        changed = [
            f.name for f in dataclasses.fields(Arm)
            if f.name not in ("name", "decodes") and getattr(arm, f.name) != getattr(default, f.name)
        ]  # fmt: skip
        assert len(changed) == 1, arm
        if changed == ["objective"]:
            fields = dataclasses.fields(arm.objective)
            assert sum(getattr(arm.objective, f.name) != getattr(default.objective, f.name) for f in fields) == 1, arm
