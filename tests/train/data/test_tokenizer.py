"""The byte-level BPE: round trip of any text, specials, Hugging Face layout."""

import json
from pathlib import Path

import pytest
import tokenizers

from train.data.tokenizer import EOS, MASK, PAD, save_tokenizer, special_ids, train_tokenizer

TEXTS = ["def f(self, x):\n    return self._value_of(x)\n\n\nclass Another:\n    pass\n\n\n    return other_name\n"] * 3


def test_any_text_round_trips():
    tokenizer = train_tokenizer(TEXTS, 285)
    for text in (TEXTS[0], "ä€\U0001f600\x00\t\r\n  mixed\n\n\n   x", "", " ", "日本語 __init__ 0x1F"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() == 285
    assert special_ids(tokenizer) == {"eos": 0, "pad": 1, "mask": 2}


def test_indentation_is_one_token():
    tokenizer = train_tokenizer(TEXTS, 285)
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("x:\n    return").ids]
    assert "\n    " in pieces


def test_saved_layout_loads_again(tmp_path: Path):
    tokenizer = train_tokenizer(TEXTS, 285)
    save_tokenizer(tmp_path, tokenizer, max_positions=64)
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert again.encode(TEXTS[0]).ids == tokenizer.encode(TEXTS[0]).ids
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["eos_token"], config["pad_token"], config["mask_token"]) == (EOS, PAD, MASK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="vocab_size must be at least 259; got 100"):
        train_tokenizer(TEXTS, 100)
    with pytest.raises(ValueError, match="more than the texts offer"):
        train_tokenizer(["ab"], 300)
