"""Tokenizer and incremental detokenising, against `tokenizers` itself and known templates."""

import itertools
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.tokenizer import StreamDecoder, Tokenizer, byte_alphabet

CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)


def build(chat_template=None) -> Tokenizer:
    """Byte-level BPE with few merges, so that most characters outside ASCII span several tokens."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=sorted(byte_alphabet()),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"],
        show_progress=False,
    )
    backend.train_from_iterator(["def f(x): return x + 1\n" * 4, "äöü äöü 🙂🙂 привет"], trainer)
    backend.add_tokens(["<tool call>", "é!"])  # plain added tokens: one with a space, one in the byte alphabet
    config = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}, "model_max_length": 64}
    return Tokenizer(backend, config=config, chat_template=chat_template)


TOKENIZER = build(CHATML)


def streamed(ids, cuts=(), skip_special_tokens=True) -> tuple[str, list[str]]:
    stream = TOKENIZER.stream(skip_special_tokens=skip_special_tokens)
    edges = [0, *sorted(c % (len(ids) + 1) for c in cuts), len(ids)] if cuts else range(len(ids) + 1)
    edges = list(edges)
    pieces = [stream.push(ids[a:b]) for a, b in itertools.pairwise(edges)]
    return "".join(pieces) + stream.flush(), pieces


@pytest.mark.smoke
def test_emoji_split_over_tokens_appears_whole():
    ids = TOKENIZER.encode("a🦊b")
    text, pieces = streamed(ids)
    assert text == "a🦊b"
    assert "" in pieces  # the bytes of the fox came one by one
    assert [p for p in pieces if p] == ["a", "🦊", "b"]


@settings(max_examples=300, deadline=None)
@given(st.text(), st.lists(st.integers(0, 1000), max_size=5))
def test_streaming_random_text_equals_decoding_it(text, cuts):
    ids = TOKENIZER.encode(text)
    whole, pieces = streamed(ids, cuts)
    assert whole == TOKENIZER.decode(ids)
    if not any(token in text for token in ("<|", "<tool call>", "é!")):
        assert whole == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.integers(0, TOKENIZER.vocab_size + 5), max_size=40),
    st.lists(st.integers(0, 1000), max_size=5),
    st.booleans(),
)
def test_streaming_random_ids_equals_decoding_them(ids, cuts, skip):
    """Random ids are mostly broken UTF-8, with special, added and unknown tokens among them."""
    assert streamed(ids, cuts, skip)[0] == TOKENIZER.decode(ids, skip_special_tokens=skip)


def test_every_id_streams_like_it_decodes():
    for token in range(TOKENIZER.vocab_size):
        assert streamed([token], skip_special_tokens=False)[0] == TOKENIZER.decode([token], skip_special_tokens=False)


def test_flush_gives_the_broken_rest_and_starts_anew():
    stream = TOKENIZER.stream()
    fox = TOKENIZER.encode("🦊")
    assert stream.push(fox[:2]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(fox) + stream.flush() == "🦊"


def test_ids_and_special_tokens():
    assert TOKENIZER.eos_ids == (TOKENIZER.token_id("<|im_end|>"),)
    assert TOKENIZER.pad_id == TOKENIZER.token_id("<|endoftext|>") == 0
    assert TOKENIZER.bos_id is None
    assert TOKENIZER.special_ids == {0, 1, 2, 3}
    assert TOKENIZER.token_id("<tool call>") == TOKENIZER.vocab_size - 2
    assert TOKENIZER.decode([0, *TOKENIZER.encode("x"), 2]) == "x"
    assert TOKENIZER.decode([0], skip_special_tokens=False) == "<|endoftext|>"


def test_a_batch_is_encoded_like_its_texts():
    backend = tokenizers.Tokenizer.from_str(TOKENIZER.backend.to_str())
    backend.enable_padding(length=50)
    texts = ["", "x", "the quick brown fox", "<|im_end|>🦊"]
    assert Tokenizer(backend).encode_batch(texts) == [TOKENIZER.encode(text) for text in texts]
    assert TOKENIZER.encode_batch([]) == []


def test_directory_round_trip(tmp_path):
    TOKENIZER.save(tmp_path)
    again = Tokenizer.from_directory(tmp_path)
    text = "def f(x): 🦊 <|im_end|>é! <tool call>"
    assert again.encode(text) == TOKENIZER.encode(text)
    assert again.chat_template == CHATML and again.eos_ids == TOKENIZER.eos_ids and again.pad_id == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_template_inside_the_config_and_named_templates(tmp_path):
    TOKENIZER.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_directory(tmp_path).chat_text([]) == "D"
    (tmp_path / "chat_template.jinja").write_text("F")  # the file wins, as in transformers
    assert Tokenizer.from_directory(tmp_path).chat_text([]) == "F"


def test_chat_renders_and_encodes():
    messages = [{"role": "user", "content": "hi"}]
    text = TOKENIZER.chat_text(messages)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    ids = TOKENIZER.chat(messages)
    assert ids == TOKENIZER.encode(text)
    assert ids[0] == TOKENIZER.token_id("<|im_start|>") and TOKENIZER.token_id("<|im_end|>") in ids
    assert TOKENIZER.chat_text(messages, add_generation_prompt=False).endswith("<|im_end|>\n")


def test_template_variables_filters_and_tags():
    template = (
        "{% generation %}{{ messages|tojson }}{% endgeneration %}{{ eos_token }}{{ enable_thinking }}"
        "{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
        "{{ strftime_now('%Y')|length }}"
    )
    messages = [{"role": "user", "content": "ä<"}]
    expected = '[{"role": "user", "content": "ä<"}]<|im_end|>False014'
    assert build(template).chat_text(messages, enable_thinking=False) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_template_errors_are_value_errors(template, message):
    with pytest.raises(ValueError, match=message):
        build(template).chat_text([{"role": "user", "content": "x"}])


def test_no_template_is_an_error():
    with pytest.raises(ValueError, match="no chat template"):
        build().chat_text([])


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.from_directory(tmp_path)
    TOKENIZER.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<nope>"}))
    with pytest.raises(ValueError, match="eos_token '<nope>'"):
        Tokenizer.from_directory(tmp_path)


def test_tokens_known_only_to_the_config_are_added_with_their_ids():
    size = TOKENIZER.vocab_size
    entry = {"content": "<extra>", "special": True}
    backend = tokenizers.Tokenizer.from_str(TOKENIZER.backend.to_str())
    added = Tokenizer(backend, config={"added_tokens_decoder": {str(size): entry}})
    assert added.encode("<extra>") == [size] and size in added.special_ids
    backend = tokenizers.Tokenizer.from_str(TOKENIZER.backend.to_str())
    with pytest.raises(ValueError, match=f"the id {size + 7}; the vocabulary gives {size}"):
        Tokenizer(backend, config={"added_tokens_decoder": {str(size + 7): entry}})


def test_a_stored_truncation_does_not_shorten_prompts():
    backend = tokenizers.Tokenizer.from_str(TOKENIZER.backend.to_str())
    backend.enable_truncation(4)
    assert len(Tokenizer(backend).encode("abc" * 10)) > 4


def test_streaming_refuses_other_decoders():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    backend.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(ValueError, match="byte-level tokenizer"):
        StreamDecoder(Tokenizer(backend))
