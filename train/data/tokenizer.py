"""Byte-level BPE for source code, trained with Hugging Face `tokenizers` and saved in their layout."""

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

EOS, PAD, MASK = "<|endoftext|>", "<|pad|>", "<|mask|>"

# A line break with the indentation after it is one piece, so the shape of a program costs few tokens; words
# take one leading space, digits stand alone, underscores are their own pieces.
CODE_PATTERN = r"\n[\n ]*| ?\p{L}+| ?_+| ?\p{N}| ?[^\s\p{L}\p{N}_]+|[^\S\n]+"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE tokeniser with the specials EOS (id 0), PAD (1) and MASK (2).

    Every byte is in the alphabet, so any text round-trips: `decode(encode(text)) == text`.

    Args:
        texts: training documents.
        vocab_size: including specials and the 256 bytes.

    Raises:
        ValueError: vocab_size too small for the alphabet, or more merges asked for than the texts offer.
    """
    specials = [EOS, PAD, MASK]
    smallest = 256 + len(specials)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest}; got {vocab_size}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(CODE_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"vocab_size {vocab_size} is more than the texts offer: {tokenizer.get_vocab_size()}")
    return tokenizer


def save_tokenizer(directory: str | Path, tokenizer: tokenizers.Tokenizer, *, max_positions: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json, as `transformers` and `jaxmodels` read them.

    Args:
        directory: existing or new.
        tokenizer: from `train_tokenizer`.
        max_positions: recorded as `model_max_length`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "mask_token": MASK,
        "bos_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
    }
    for name, content in (
        ("tokenizer.json", tokenizer.to_str(pretty=True)),
        ("tokenizer_config.json", json.dumps(config, indent=2)),
    ):
        temporary = directory / f".{name}.tmp"
        temporary.write_text(content, "utf-8")
        temporary.replace(directory / name)


def special_ids(tokenizer: tokenizers.Tokenizer) -> dict[str, int]:
    """`{"eos": id, "pad": id, "mask": id}`.

    Raises:
        ValueError: the tokeniser lacks one of them.
    """
    ids = {}
    for name, token in (("eos", EOS), ("pad", PAD), ("mask", MASK)):
        found = tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(f"the tokeniser has no {name} token {token!r}")
        ids[name] = found
    return ids
