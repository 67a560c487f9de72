"""Prompts from the held-out files of the demonstration corpus, as tokens."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxmodels.demo.completions import PromptCut, choose_cuts, find_cuts
from jaxmodels.demo.corpus import Corpus, load_corpus

FOLLOWING = 2000  # characters


@dataclasses.dataclass(frozen=True)
class CodePrompt:
    """What a model reads, and what its completion is judged with.

    Attributes:
        ids: the last tokens before the cut; their number is a multiple of the block length, so that the
            blocks of a completion lie as in training.
        cut: file and code before the completion.
        following: how the file goes on, at least as long as any completion.
    """

    ids: tuple[int, ...]
    cut: PromptCut
    following: str


def corpus_prompts(
    tokenizer: Any,
    count: int,
    *,
    max_tokens: int,
    multiple: int,
    seed: int = 0,
    split: str = "test",
    corpus: Corpus | None = None,
) -> list[CodePrompt]:
    """`count` prompts drawn from all places where a statement of a held-out file ends.

    Args:
        tokenizer: a jaxmodels Tokenizer.
        count: number of prompts.
        max_tokens: longest prompt.
        multiple: prompt lengths are multiples of this.
        seed: of the choice.
        split: of the corpus.
        corpus: the running interpreter's if None.
    """
    files = (corpus or load_corpus()).split(split)
    cuts = [cut for path, text in files.items() for cut in find_cuts(path, text)]
    places = []
    for cut in choose_cuts(cuts, count, seed):
        text = files[cut.path]
        end = text.index(cut.context) + len(cut.context)
        places.append((cut, text[end : end + FOLLOWING], max_tokens))
    return prompts_at(tokenizer, places, multiple=multiple)


def prompt_at(tokenizer: Any, cut: PromptCut, following: str, *, max_tokens: int, multiple: int) -> CodePrompt:
    """The prompt that ends at this place; arguments as in `corpus_prompts`."""
    return prompts_at(tokenizer, [(cut, following, max_tokens)], multiple=multiple)[0]


def prompts_at(tokenizer: Any, places: Sequence[tuple[PromptCut, str, int]], *, multiple: int) -> list[CodePrompt]:
    """The prompts that end at these places, each with how its file goes on and its own `max_tokens`."""
    if bad := [most for _, _, most in places if most < multiple]:
        raise ValueError(f"max_tokens must be at least {multiple}; got {bad[0]}")
    # Encoding starts far enough back that only tokens which are dropped anyway depend on where.
    texts = [cut.context[-most * 8 :] for cut, _, most in places]
    prompts = []
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    for (cut, following, most), ids in zip(places, encoded, strict=True):
        length = min(most, len(ids)) // multiple * multiple
        prompts.append(CodePrompt(tuple(ids[len(ids) - length :]), cut, following))
    return prompts


def write_prompts(path: Path, prompts: Iterable[CodePrompt]) -> None:
    """One JSON object per line: ids, path, context, following."""
    records = ({"ids": p.ids, "path": p.cut.path, "context": p.cut.context, "following": p.following} for p in prompts)
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)


def read_prompts(path: Path) -> list[CodePrompt]:
    """What `write_prompts` wrote."""
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [CodePrompt(tuple(r["ids"]), PromptCut(r["path"], r["context"]), r["following"]) for r in records]
