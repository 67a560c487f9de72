"""Completions of a converted model, judged, as data for its own further training.

A block-diffusion model that learnt from real text is seldom sure of two tokens at once: where text can go on in many
ways, so can every token of a block. Its own greedy completions are a function of the prompt. A model that learns them
can be sure of several tokens together, and decodes more of them per pass: sequence-level distillation, as it made
parallel translation work (Kim and Rush, arXiv 1606.07947; Gu et al., arXiv 1711.02281; for diffusion language models:
dParallel, arXiv 2509.26488). Of the completions only those are learnt that parse, hold enough statements and do not
repeat themselves, so the model also learns from a judge that the autoregressive model never met.

Prompts end where a statement of a training file ends. Decoding is greedy, at a threshold so high that the text is that
of one token per pass, in a fraction of the time.
"""

import concurrent.futures
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.decoding.block_diffusion import RevealOptions
from jaxmodels.decoding.complete import complete_blocks
from jaxmodels.demo.completions import MIN_STATEMENTS, PromptCut, find_cuts, parse_completion
from jaxmodels.demo.prompts import CodePrompt, prompts_at
from train.data.pairs import PairRows
from train.data.rows import RowStore
from train.recipes.demo import DistillConfig

CHUNK = 256  # files or completions that a worker process takes at once


class Teaching:
    """Makes the pairs of prompt and accepted completion that a model learns from.

    Args:
        store: training rows, whose documents are the files that prompts come from.
        tokenizer: a jaxmodels Tokenizer.
        settings: how many prompts, how long, and what is accepted.
        block_size: prompt lengths are multiples of this.
        report: a `train.metrics.Reporter`.
    """

    def __init__(self, store: RowStore, tokenizer: Any, settings: DistillConfig, block_size: int, report: Any):
        self.store, self.tokenizer, self.settings = store, tokenizer, settings
        self.block_size, self.report = block_size, report
        self._cuts: list[PromptCut] = []

    def pairs(self, path: Path, lm: Any, params: Any, *, seed: int) -> PairRows:
        """The accepted completions of a model, from `path` if they are there, else made and written there.

        Args:
            path: an `.npz` file.
            lm: block-diffusion model.
            params: its weights.
            seed: of the choice of prompts.

        Raises:
            ValueError: the files have no place for a prompt, or nothing was accepted.
        """
        import jax

        if path.is_file():
            return PairRows.load(path)
        before = time.perf_counter()

        def say(what: str) -> None:
            self.report.line(f"{what} after {time.perf_counter() - before:.0f} s")

        with _workers() as workers:
            prompts = self._prompts(seed, workers)
            say(f"{len(prompts):,} prompts")
            done = complete_blocks(
                lm,
                params,
                [prompt.ids for prompt in prompts],
                max_new_tokens=self.settings.new_tokens,
                batch=min(len(prompts), 16 if jax.default_backend() == "cpu" else 1024),
                reveal=RevealOptions(threshold=self.settings.threshold),
                on_batch=lambda count: say(f"{count:,} completions"),
            )
            ends = self.tokenizer.special_ids
            jobs = [
                (prompt.cut.context, self.tokenizer.decode(completion.tokens), completion.tokens[-1] in ends)
                for prompt, completion in zip(prompts, done, strict=True)
            ]
            distinct = np.asarray([*workers.map(_distinct, *zip(*jobs, strict=True), chunksize=CHUNK)])
        good = np.flatnonzero(distinct >= self.settings.min_distinct)
        forwards = sum(completion.forwards for completion in done)
        say(
            f"accepted {len(good):,} of {len(prompts):,} completions ({(distinct >= 0).mean():.1%} were valid, "
            f"{sum(len(completion.tokens) for completion in done) / forwards:.2f} tokens per forward)"
        )
        if not len(good):
            raise ValueError(f"none of {len(prompts)} completions was accepted: the model cannot teach itself")
        pairs = PairRows.from_pairs([(prompts[i].ids, done[i].tokens) for i in good], self.store.seq_len)
        path.parent.mkdir(parents=True, exist_ok=True)
        pairs.save(path)
        return pairs

    def _prompts(self, seed: int, workers: concurrent.futures.Executor) -> list[CodePrompt]:
        """Different prompts of random lengths from random places where a statement of a training file ends."""
        settings, block = self.settings, self.block_size
        if not self._cuts:
            texts = [self.tokenizer.decode(ids.tolist()) for ids in self.store.documents()]
            found = workers.map(find_cuts, map(str, range(len(texts))), texts, chunksize=4)
            self._cuts = [cut for own in found for cut in own]
        if not self._cuts:
            raise ValueError("the training files have no place where a statement ends: nothing to complete")
        rng = np.random.default_rng(seed)
        rounds = -(-settings.prompts // len(self._cuts))
        chosen = np.concatenate([rng.permutation(len(self._cuts)) for _ in range(rounds)])[: settings.prompts]
        shortest = -(-settings.shortest_prompt // block)
        longest = max(shortest, settings.longest_prompt // block)
        lengths = rng.integers(shortest, longest + 1, settings.prompts) * block
        places = [(self._cuts[i], "", int(length)) for i, length in zip(chosen, lengths, strict=True)]
        prompts = prompts_at(self.tokenizer, places, multiple=block)
        return list({prompt.ids: prompt for prompt in prompts if prompt.ids}.values())


def _distinct(context: str, completion: str, ended: bool) -> float:
    """Share of distinct statements of a valid completion; -1 if it is not valid."""
    parsed = parse_completion(context, completion, ended=ended)
    return parsed.distinct if parsed.statements >= MIN_STATEMENTS else -1.0


def _workers() -> concurrent.futures.ProcessPoolExecutor:
    """One process per core, started afresh: JAX has threads, which a fork would not survive."""
    return concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))
