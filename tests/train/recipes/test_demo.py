"""The chain behind `quickstart` and `shipped` at the smallest size, its record, and its own losses and measures."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import load_pretrained
from jaxmodels.demo.corpus import Corpus
from jaxmodels.qwen import QwenConfig, build
from jaxmodels.tokenizer import Tokenizer
from train.data.rows import RowStore
from train.objectives.next_token import make_next_token_loss
from train.recipes import demo
from train.recipes.demo import DistillConfig, StageConfig, make_dropped_input_loss
from train.recipes.quickstart import Quickstart
from train.recipes.shipped import Shipped


def source(name: str) -> str:
    return "".join(
        f"def {name}_{i}(value):\n    other = value + {i}\n    return other * value\n\n\n" for i in range(30)
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Quickstart:
    stage = StageConfig(4, 2, 1e-3, 1)
    return Quickstart(
        directory=tmp_path_factory.mktemp("chain"), vocab_size=280, dim=64, layers=1, heads=1, mlp_dim=64, seq_len=32,
        block_size=4, ar=stage, dlm=dataclasses.replace(stage, eval_every=2), completions=2, eval_rows=4,
    )  # fmt: skip


@pytest.fixture
def library(monkeypatch):
    splits = {"a.py": "train", "b.py": "train", "c.py": "validation", "d.py": "test"}
    corpus = Corpus({name: source(name[0]) for name in splits}, splits, (), ())
    monkeypatch.setattr("jaxmodels.demo.corpus.load_corpus", lambda *_: corpus)
    monkeypatch.setattr("jaxmodels.demo.prompts.load_corpus", lambda *_: corpus)


def test_chain_makes_models_continues_and_records(config, library, capsys):
    root = config.directory
    assert demo.run(dataclasses.replace(config, until="ar"), "first command") == 0
    assert (root / "ar" / "config.json").is_file() and not (root / "dlm").exists()
    assert demo.run(config, "second command") == 0
    out = "".join(capsys.readouterr())
    assert "already trained" in out and "AR, exact" in out and "one token a step" in out

    record = json.loads((root / "record.json").read_text())
    assert record["commands"] == ["first command", "second command"]
    assert list(record["stages"]) == ["store", "ar", "dlm", "evaluation"]
    assert record["config"]["vocab_size"] == 280 and "directory" not in record["config"]
    values = record["stages"]["evaluation"]
    assert set(values["completions"]) == {"one token a step", "0.9", "0.7", "0.5"}
    assert values["completions"]["one token a step"]["tokens_per_forward"] == pytest.approx(1.0, abs=0.15)
    assert 0 < values["nats_per_token"]["AR, exact"] < 2 * np.log(280) and values["drift"]["drift_attention"] > 0

    ar, dlm = load_pretrained(root / "ar"), load_pretrained(root / "dlm")
    assert (ar.config.block_size, dlm.config.block_size) == (None, 4)
    assert dlm.config.mask_id == dlm.tokenizer.token_id(dlm.tokenizer.special_tokens["mask_token"])
    assert ar.params["embed"].dtype == jnp.bfloat16
    # The best weights by the bound were kept, and are the model.
    best = load_pretrained(root / "dlm-run" / "best", dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, best.params, dlm.params)
    note = json.loads((root / "dlm-run" / "best" / "note.json").read_text())
    assert record["stages"]["dlm"]["best_validation"] == note["value"]

    with pytest.raises(ValueError, match=r"other settings \(dim\)"):
        demo.run(dataclasses.replace(config, dim=128), "third command")
    moved = dataclasses.replace(config, directory=root / "elsewhere", store=root / "store", until="store")
    assert demo.run(moved, "carried") == 0
    with pytest.raises(ValueError, match="rows of 32 tokens of 280; this run needs seq_len 64"):
        demo.run(dataclasses.replace(moved, directory=root / "other", seq_len=64), "carried")


def test_the_converted_model_learns_its_own_accepted_completions(config, library, monkeypatch, capsys):
    """After the chain above: completions are made once, and all of the accepted ones are what is learnt."""
    from train.data.pairs import PairRows
    from train.recipes import distill

    root = config.directory
    (root / "record.json").unlink()
    settings = DistillConfig(6, config.ar, rounds=1, shortest_prompt=4, longest_prompt=16, new_tokens=16)
    own = dataclasses.replace(config, distill=settings, until="distilled")
    scores = {}

    def judge(context, completion, ended):
        return scores.setdefault(context, [0.7, 0.5, -1.0, 0.6, 0.1, 0.9][len(scores) % 6])

    monkeypatch.setattr(distill, "_distinct", judge)
    # A function of the test is unknown to fresh processes.
    monkeypatch.setattr(distill, "_workers", lambda: distill.concurrent.futures.ThreadPoolExecutor(1))
    assert demo.run(own, "distil") == 0
    assert "accepted 4 of 6 completions (83.3% were valid, " in "".join(capsys.readouterr())
    pairs = PairRows.load(root / "distilled-run" / "pairs.npz")
    assert len(pairs) == 4 and pairs.tokens.shape[1] == config.seq_len
    assert all(pairs.prompt_lengths % config.block_size == 0) and max(pairs.prompt_lengths) <= 16
    assert json.loads((root / "record.json").read_text())["stages"]["distilled"]["steps"] == 4
    before, after = (load_pretrained(root / name).params["embed"] for name in ("dlm", "distilled"))
    assert not np.array_equal(before, after)

    monkeypatch.setattr(distill, "complete_blocks", None)  # nothing is made again
    assert demo.run(own, "distil") == 0


def test_places_are_used_again_with_prompts_of_other_lengths(config, library):
    """Of the store that the chain above made."""
    from train.recipes import distill

    store, tokenizer = RowStore(config.directory / "store"), Tokenizer.from_directory(config.directory / "tokenizer")

    def prompts(count: int) -> list[tuple[int, ...]]:
        settings = DistillConfig(count, config.ar, shortest_prompt=4, longest_prompt=16, new_tokens=16)
        teaching = distill.Teaching(store, tokenizer, settings, config.block_size, report=None)
        with distill.concurrent.futures.ThreadPoolExecutor(1) as workers:
            return [prompt.ids for prompt in teaching._prompts(0, workers)]

    few, many = prompts(1), prompts(2000)
    assert len(few) == 1 and few[0] in many
    assert len(set(many)) == len(many) < 2000
    ends = [(short, long) for short in many for long in many if len(short) < len(long)]
    assert any(long[-len(short) :] == short for short, long in ends), "no place was used with two lengths"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quickstart(block_size=7), "block_size must divide seq_len = 128; got 7"),
        (lambda: Quickstart(input_dropout=1.0), r"input_dropout must lie in \[0, 1\)"),
        (lambda: Quickstart(completions=-1), "completions must not be negative; got -1"),
        (lambda: DistillConfig(0, StageConfig(1, 1, 1e-3, 0)), "prompts must be at least 1; got 0"),
        (lambda: DistillConfig(1, StageConfig(1, 1, 1e-3, 0), share=1.0), r"share must lie in \(0, 1\); got 1.0"),
        (
            lambda: Shipped(distill=DistillConfig(1, StageConfig(1, 1, 1e-3, 0), new_tokens=256)),
            "distill.longest_prompt and distill.new_tokens need 640 tokens; a row has 512",
        ),
        (lambda: StageConfig(0, 1, 1e-3, 0), "steps must be positive; got 0"),
        (lambda: StageConfig(10, 1, 1e-3, 10), r"warmup_steps must lie in \[0, steps=10\); got 10"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_shipped_models_fit_their_size():
    special = {"eos": 0, "pad": 1, "mask": 2}
    shipped = Shipped()
    lm = build(shipped.model(special, diffusion=True))
    shapes = jax.eval_shape(lambda: lm.init(jax.random.key(0)))
    assert sum(2 * leaf.size for leaf in jax.tree.leaves(shapes)) < 8e6, "bfloat16"
    assert shipped.dim % 128 == shipped.mlp_dim % 128 == 0


def test_dropped_inputs_leave_targets_clean():
    config = QwenConfig.tiny(vocab_size=32, layers=1, dim=16, mlp_dim=32, head_dim=8, mask_id=3)
    lm = build(config)
    params = lm.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 4, 32)
    batch = {
        "tokens": tokens, "segment_ids": jnp.ones((2, 8), jnp.int32), "loss_mask": jnp.ones((2, 8), bool),
        "positions": jnp.broadcast_to(jnp.arange(8), (2, 8)),
    }  # fmt: skip
    key = jax.random.key(2)
    plain = make_next_token_loss(lm)(params, batch, key)
    none = make_dropped_input_loss(lm, 0.0)(params, batch, key)
    np.testing.assert_allclose(none[0], plain[0], rtol=1e-6)
    assert none[1] == plain[1] == 14
    # Rate (almost) 1: all inputs but the first are masked, targets are the tokens.
    masked = jnp.full_like(tokens, 3).at[:, 0].set(tokens[:, 0])
    logp = jax.nn.log_softmax(lm.apply(params, masked))[:, :-1]
    expected = -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1).sum()
    np.testing.assert_allclose(make_dropped_input_loss(lm, 1.0)(params, batch, key)[0], expected, rtol=1e-5)
    assert not np.allclose(plain[0], expected, rtol=1e-3)
