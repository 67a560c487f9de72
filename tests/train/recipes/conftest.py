"""A tiny model with a tokeniser, and text: what recipes start from."""

import json

import jax
import pytest
import tokenizers

from jaxmodels import save_pretrained
from jaxmodels.qwen import QwenConfig, build
from jaxmodels.tokenizer import Tokenizer

TEXTS = [f"def f{i}(x):\n    return x + {i}\n\n\nfor j in range({i}):\n    print(f{i}(j))\n" * 4 for i in range(40)]


@pytest.fixture(scope="session")
def make_start(tmp_path_factory):
    """`make_start(dtype=None, **config)`: directories of a random model with a byte-level tokeniser and of a corpus.

    Its vocabulary has "<eos>" (0) and "<spare>" (1); it has no mask token.
    """

    def make(dtype=None, **config):
        directory = tmp_path_factory.mktemp("start")
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<eos>", "<spare>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(TEXTS, trainer)
        lm = build(QwenConfig.tiny(vocab_size=304, eos_ids=(0,), pad_id=None, mask_id=None, **config))
        tokenizer = Tokenizer(backend, config={"eos_token": "<eos>"})
        save_pretrained(directory / "init", lm, lm.init(jax.random.key(0)), tokenizer=tokenizer, dtype=dtype)
        corpus = directory / "corpus.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        return directory / "init", corpus

    return make
