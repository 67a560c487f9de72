"""Prompts: where they end, how long they are, and that files keep them exactly."""

import ast

import numpy as np
import pytest
import tokenizers

from jaxmodels.demo.completions import PromptCut
from jaxmodels.demo.corpus import Corpus
from jaxmodels.demo.prompts import FOLLOWING, CodePrompt, corpus_prompts, prompt_at, read_prompts, write_prompts
from jaxmodels.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One token per byte."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend)


def module(name: str) -> str:
    return "".join(f"def {name}_{i}(x):\n    y = x + {i}\n    return y * {i}\n\n\n" for i in range(40))


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    texts = {"a.py": module("a"), "b.py": module("b"), "train.py": module("t")}
    return Corpus(texts, {"a.py": "test", "b.py": "test", "train.py": "train"}, (), ())


def test_prompts_end_where_a_statement_ends_in_held_out_files(tokenizer, corpus):
    prompts = corpus_prompts(tokenizer, 40, max_tokens=64, multiple=16, corpus=corpus)
    assert len(prompts) == 40 and {p.cut.path for p in prompts} == {"a.py", "b.py"}
    for prompt in prompts:
        text = corpus.texts[prompt.cut.path]
        assert prompt.cut.context.endswith(tokenizer.decode(prompt.ids)) and len(prompt.ids) == 64
        whole = prompt.cut.context + prompt.following
        assert whole in text and prompt.following.startswith("\n") and len(prompt.following) <= FOLLOWING
        # The context is a whole number of logical lines: at most the body of its last header is missing.
        ast.parse(prompt.cut.context + ("\n  pass" if prompt.cut.context.endswith(":") else ""))


def test_choice_depends_on_the_seed_only(tokenizer, corpus):
    def make(seed):
        return corpus_prompts(tokenizer, 10, max_tokens=32, multiple=8, seed=seed, corpus=corpus)

    assert make(1) == make(1) and make(1) != make(2)
    more = corpus_prompts(tokenizer, 20, max_tokens=32, multiple=8, seed=1, corpus=corpus)
    assert more[:10] == make(1), "a smaller evaluation is the beginning of a larger one"


def test_lengths_are_multiples_also_of_short_contexts(tokenizer):
    cut = PromptCut("a.py", "x = 1\ny = 22")  # 12 bytes
    assert len(prompt_at(tokenizer, cut, "", max_tokens=64, multiple=8).ids) == 8
    assert tokenizer.decode(prompt_at(tokenizer, cut, "", max_tokens=10, multiple=5).ids) == "= 1\ny = 22"
    with pytest.raises(ValueError, match="max_tokens must be at least 16; got 8"):
        prompt_at(tokenizer, cut, "", max_tokens=8, multiple=16)


def test_more_prompts_than_places_is_an_error(tokenizer, corpus):
    with pytest.raises(ValueError, match="count must be at most"):
        corpus_prompts(tokenizer, 10_000, max_tokens=32, multiple=8, corpus=corpus)
    with pytest.raises(ValueError, match="split must be one of"):
        corpus_prompts(tokenizer, 1, max_tokens=32, multiple=8, corpus=corpus, split="dev")


def test_files_keep_prompts_exactly(tmp_path):
    rng = np.random.default_rng(0)
    prompts = [
        CodePrompt(tuple(rng.integers(0, 500, n).tolist()), PromptCut("p/q.py", "é = '\u2028'\n\ty"), "\r\n# \x0c ü")
        for n in (0, 3)
    ]
    path = tmp_path / "new" / "prompts.jsonl"
    write_prompts(path, prompts)
    assert read_prompts(path) == prompts and [f.name for f in path.parent.iterdir()] == ["prompts.jsonl"]
