"""Text to token ids and back, from a Hugging Face directory and without transformers.

`tokenizers` does the encoding, Jinja2 (sandboxed) the chat template. `StreamDecoder` turns ids into text
piece by piece so that the pieces always add up to the decoding of the whole.
"""

import codecs
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from jaxmodels.checkpoints.huggingface import read_json, write_json
from jaxmodels.checkpoints.safetensors import atomic_file

NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def _content(value: Any) -> str | None:
    """A token of tokenizer_config.json is a string, or an object holding it."""
    return value.get("content") if isinstance(value, Mapping) else value


class Tokenizer:
    """A `tokenizers.Tokenizer` with the special tokens and the chat template of its model.

    Ids are Python ints. `vocab_size` counts the tokens that exist; a model's embedding may have more rows.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        config: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ):
        """`config` holds what tokenizer_config.json does; only its special tokens and chat template are used.

        Raises ValueError for a special token that the vocabulary does not have.
        """
        self.backend = backend
        self.backend.no_truncation()  # a length stored with the tokenizer must not shorten prompts silently
        self.backend.no_padding()
        self.config = dict(config or {})
        self.chat_template = self._find_template() if chat_template is None else chat_template
        self._add_missing_tokens()
        self.special_tokens = {
            name: token for name in NAMED_TOKENS if (token := _content(self.config.get(name))) is not None
        }
        for name, token in self.special_tokens.items():
            if self.token_id(token) is None:
                raise ValueError(f"{name} {token!r} is not in the tokenizer's vocabulary")

    @classmethod
    def from_directory(cls, directory: str | os.PathLike) -> "Tokenizer":
        """Reads tokenizer.json, and where they exist tokenizer_config.json and chat_template.jinja.

        Raises ValueError naming the file when tokenizer.json is missing or a file cannot be understood.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{directory}: has no tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(f"{path}: not a tokenizer ({error})") from None
        config_path, template_path = directory / "tokenizer_config.json", directory / "chat_template.jinja"
        config = read_json(config_path) if config_path.is_file() else {}
        template = template_path.read_text("utf-8") if template_path.is_file() else None
        try:
            return cls(backend, config=config, chat_template=template)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the three files that `from_directory` reads, each atomically."""
        directory = Path(directory)
        with atomic_file(directory / "tokenizer.json") as file:
            file.write(self.backend.to_str(pretty=True).encode())
        config = {k: v for k, v in self.config.items() if k != "chat_template"}
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        write_json(directory / "tokenizer_config.json", config)
        if self.chat_template is not None:
            with atomic_file(directory / "chat_template.jinja") as file:
                file.write(self.chat_template.encode())

    def _find_template(self) -> str | None:
        template = self.config.get("chat_template")
        if isinstance(template, list):  # several by name
            named = {entry["name"]: entry["template"] for entry in template}
            if "default" not in named:
                raise ValueError(f"chat_template has no default among {sorted(named)}")
            return named["default"]
        return template

    def _add_missing_tokens(self) -> None:
        """Tokens that only tokenizer_config.json knows; their ids must come out as it says."""
        entries = sorted((int(i), e) for i, e in (self.config.get("added_tokens_decoder") or {}).items())
        for token_id, entry in entries:
            token = entry["content"]
            if self.token_id(token) is None:
                flags = ("lstrip", "rstrip", "single_word", "normalized")
                options = {flag: entry[flag] for flag in flags if flag in entry}
                special = bool(entry.get("special"))
                self.backend.add_tokens([tokenizers.AddedToken(token, special=special, **options)])
            if self.token_id(token) != token_id:
                raise ValueError(
                    f"added_tokens_decoder gives {token!r} the id {token_id}; the vocabulary gives "
                    f"{self.token_id(token)}"
                )

    def token_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    @cached_property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out by default."""
        return frozenset(i for i, t in self.backend.get_added_tokens_decoder().items() if t.special)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokenizer's own end token; a model's generation_config.json may add others."""
        token = self._named_id("eos_token")
        return () if token is None else (token,)

    @property
    def bos_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def pad_id(self) -> int | None:
        return self._named_id("pad_token")

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_id(token)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; special tokens written in it become their ids, as in other libraries.

        With `add_special_tokens` also those that the tokenizer puts around every text (Qwen's puts none).
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        found = self.backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in found]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; ids without a token give nothing, broken UTF-8 gives U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Ids of a conversation: `chat_text`, encoded."""
        text = self.chat_text(messages, add_generation_prompt=add_generation_prompt, tools=tools, **variables)
        return self.encode(text, add_special_tokens=False)  # the template writes them itself

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        **variables: Any,
    ) -> str:
        """The model's chat template filled with `messages` ({"role": ..., "content": ...} each).

        `variables` reach the template under their names (Qwen3: `enable_thinking=False`).
        Raises ValueError when there is no template, and with the template's own message when it objects.
        """
        import jinja2

        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template; give a plain prompt")
        try:
            return self._compiled_template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self.special_tokens, **variables},
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"chat template: {error}") from None

    @cached_property
    def _compiled_template(self) -> Any:
        import jinja2
        import jinja2.ext
        import jinja2.nodes
        import jinja2.sandbox

        class Generation(jinja2.ext.Extension):
            """`{% generation %}`, which marks the assistant's tokens for training masks: text passes
            through."""

            tags = {"generation"}  # noqa: RUF012  (the attribute that Jinja2 asks for)

            def parse(self, parser: Any) -> Any:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
            return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        # Models come from strangers: no attribute of a Python object can be reached, nothing can be changed.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment.from_string(self.chat_template or "")

    def stream(self, *, skip_special_tokens: bool = True) -> "StreamDecoder":
        """A decoder for one row of a running generation."""
        return StreamDecoder(self, skip_special_tokens=skip_special_tokens)


def byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE vocabularies (GPT-2's alphabet)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTES = byte_alphabet()


class StreamDecoder:
    """Ids in, text out, for one row; a character is held back until all of its bytes are there.

    The pieces of all `push` calls and one final `flush` add up to `tokenizer.decode(all ids)`, also for ids
    whose bytes are no UTF-8 (each maximal broken part gives one U+FFFD in both).
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        """Raises ValueError for a tokenizer that is not byte-level (its text depends on neighbours)."""
        decoder = tokenizer.backend.decoder
        if not isinstance(decoder, tokenizers.decoders.ByteLevel):
            raise ValueError(f"streaming needs a byte-level tokenizer; this one decodes with {decoder!r}")
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._text = codecs.getincrementaldecoder("utf-8")("replace")

    def _bytes_of(self, token_id: int) -> bytes:
        token = None if token_id in self._skipped else self._tokenizer.backend.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(_BYTES[char] for char in token)
        except KeyError:  # an added token written in plain text
            return token.encode()

    def push(self, ids: Iterable[int]) -> str:
        """The text that became certain with `ids`; may be empty."""
        return self._text.decode(b"".join(self._bytes_of(int(i)) for i in ids))

    def flush(self) -> str:
        """What is still held back, as U+FFFD; the decoder then starts anew."""
        rest = self._text.decode(b"", final=True)
        self._text.reset()
        return rest
