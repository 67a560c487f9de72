"""A tiny checkpoint directory with a byte-level tokenizer and a chat template, made once per run."""

import jax
import pytest
import tokenizers

from jaxmodels.pretrained import Pretrained, load_pretrained, save_pretrained
from jaxmodels.qwen import QwenConfig, build
from jaxmodels.tokenizer import Tokenizer

SPECIALS = ["<pad>", "<eos>", "<mask>", "<turn>"]
TEMPLATE = "{% for m in messages %}<turn>{{ m.role }}:{{ m.content }}{% endfor %}<turn>assistant:"


def byte_tokenizer() -> Tokenizer:
    """One token per byte after the special ones: ids 0..3, then 4 + rank of the byte in the sorted alphabet."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIALS, *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    return Tokenizer(backend, config={"eos_token": "<eos>", "pad_token": "<pad>"}, chat_template=TEMPLATE)


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "tiny"
    lm = build(QwenConfig.tiny(vocab_size=260, layers=2, dim=32, mlp_dim=64, head_dim=16, eos_ids=(1,)))
    params = lm.init(jax.random.key(0))
    # Large weights make the choices of a random model decided rather than nearly uniform.
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, params)
    save_pretrained(directory, lm, params, tokenizer=byte_tokenizer())
    return directory


@pytest.fixture(scope="session")
def tiny_diffusion_directory(tmp_path_factory):
    """The same as a block-diffusion model."""
    directory = tmp_path_factory.mktemp("model") / "tiny-diffusion"
    lm = build(QwenConfig.tiny(vocab_size=260, layers=2, dim=32, mlp_dim=64, head_dim=16, eos_ids=(1,), block_size=4))
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, lm.init(jax.random.key(0)))
    save_pretrained(directory, lm, params, tokenizer=byte_tokenizer())
    return directory


@pytest.fixture(scope="session")
def tiny(tiny_directory) -> Pretrained:
    return load_pretrained(tiny_directory)
