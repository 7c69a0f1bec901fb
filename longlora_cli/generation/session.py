"""One model and what it has read: answers that run only the tokens which are new.

A session reads with a `Reader`, which keeps the past and the exact ids of it. A prompt that begins with the same ids
goes on from there; the longest common prefix is found on ids, never on text. What was interrupted leaves a valid
prefix behind.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor

from longlora_cli.data.chat_template import end_token_id
from longlora_cli.errors import SettingsError
from longlora_cli.generation.past import PLAIN, Past
from longlora_cli.generation.prefill import Advance
from longlora_cli.generation.reader import Query, Reader
from longlora_cli.generation.reader_choice import held_bytes_for, open_reader
from longlora_cli.generation.sampling import Sampler, greedy
from longlora_cli.generation.stopping import StopWatch
from longlora_cli.generation.text_stream import TextStream
from longlora_cli.models.loading import LoadedModel

_ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

Finish = Literal["eos", "stop", "length", "interrupted"]
OnToken = Callable[[int, str], None]


@dataclass(frozen=True)
class Answer:
    """What the model said, and what it cost.

    Args:
        ids: The generated tokens without the one that ended them.
        text: Their text without special tokens.
        finish: `eos`: the model ended; `stop`: a string that ends it is in its text; `length`: `max_new_tokens` were
            made; `interrupted`: Ctrl-C.
        prompt_tokens: Length of the prompt.
        reused_tokens: Tokens of the prompt that were in the cache.
        prefill_seconds: Until the first token was chosen; also of a prefill that was interrupted.
        decode_seconds: From then on.
        kv_bytes: Keys and values held afterwards.
    """

    ids: list[int]
    text: str
    finish: Finish
    prompt_tokens: int
    reused_tokens: int
    prefill_seconds: float
    decode_seconds: float
    kv_bytes: int

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens run per second."""
        return (self.prompt_tokens - self.reused_tokens) / max(self.prefill_seconds, 1e-9)

    @property
    def decode_rate(self) -> float:
        """New tokens per second after the first; 0 when there is at most one."""
        return max(len(self.ids) - 1, 0) / max(self.decode_seconds, 1e-9)


def stop_ids(loaded: LoadedModel) -> frozenset[int]:
    """Tokens that end an answer: of the tokenizer, the generation config and the template's end of turn."""
    found = {loaded.tokenizer.eos_token_id}
    for config in (getattr(loaded.causal_lm, "generation_config", None), loaded.causal_lm.config):
        own = getattr(config, "eos_token_id", None)
        found |= set(own) if isinstance(own, list | tuple) else {own}
    found.add(end_token_id(loaded.tokenizer))
    return frozenset(token for token in found if token is not None)


def refuse_overflow(prompt_tokens: int, max_new_tokens: int, limit: int, past: Past = PLAIN) -> None:
    """Raise `SettingsError` when prompt and answer exceed the context; nothing is ever cut to fit."""
    needed = prompt_tokens + max_new_tokens
    if needed <= limit:
        return
    room = limit - prompt_tokens
    remedies = [f"give {needed - limit:,} tokens less of text"]
    if room > 0:
        remedies.append(f"use --max-new-tokens {room}")
    if past.fine_rows:  # they take positions that text could have
        remedies.append("bring less of it back with --retrieval-topk or --retrieval-key-length")
    remedies.append("use a run trained for longer, or stretch the positions with --rope")
    raise SettingsError(
        f"the prompt has {prompt_tokens:,} tokens and the answer up to {max_new_tokens:,}: "
        f"{needed:,} are needed, the context has {limit:,}",
        rule="Text is never cut without being asked.",
        hint="; or ".join(remedies)[:1].upper() + "; or ".join(remedies)[1:] + ".",
    )


class Session:
    """A model with the past of one conversation.

    Args:
        loaded: The model; several sessions may share it when its positions do not depend on the length.
        prefill_chunk: Tokens of a prompt run at one time.
        context_length: Most tokens of prompt and answer; default: what fits the model's positions.
        past: How what was read is kept.

    Raises:
        SettingsError: The model's keys and values cannot be held so.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        prefill_chunk: int = 4096,
        context_length: int | None = None,
        past: Past = PLAIN,
    ) -> None:
        self.loaded = loaded
        self.past = past
        self.context_length = context_length or past.readable(loaded.context_length, loaded.positions)
        self._reader: Reader = open_reader(loaded, past, prefill_chunk=prefill_chunk)

    @property
    def ids(self) -> list[int]:
        """The token ids that were read and are held."""
        return self._reader.ids

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values held now."""
        return self._reader.kv_bytes

    def kv_bytes_for(self, tokens: int) -> int:
        """Bytes of keys and values that this many tokens will take; known before they are run."""
        return held_bytes_for(
            self.past,
            self.loaded.facts,
            tokens,
            element_bytes=_ELEMENT_BYTES[self.loaded.dtype],
            positions=self.loaded.positions,
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that a token takes in a long text."""
        tokens = 1 << 16
        return self.kv_bytes_for(tokens) // tokens

    def reusable(self, ids: Sequence[int]) -> int:
        """How many of these tokens need not be run. The last always is, for its logits."""
        return self._reader.reusable(ids)

    def clear(self) -> None:
        """Forget everything and free the memory."""
        self._reader.clear()

    def answer(
        self,
        ids: Sequence[int],
        *,
        max_new_tokens: int,
        stop_ids: Collection[int],
        stop: Sequence[str] = (),
        sampler: Sampler = greedy,
        on_token: OnToken | None = None,
        advance: Advance | None = None,
        allow_beyond: bool = False,
        query: Query | None = None,
    ) -> Answer:
        """Read a prompt and answer it.

        Args:
            ids: The whole prompt, at least one token; what is held of it is not run again.
            max_new_tokens: Most tokens of the answer.
            stop_ids: Tokens that end it.
            stop: Strings that end it; its text still holds the one that was met (`stopping.cut_at`).
            sampler: Chooses a token from logits `[vocabulary]`.
            on_token: Called for each token with its id and the text that it completes, and at the end with
                the last id once more if a text was unfinished.
            advance: Called with the number of prompt tokens just run.
            allow_beyond: Measure a model beyond its context length on purpose.
            query: What retrieval searches the past by; needed where the past is kept with retrieval.

        Returns:
            The answer. Ctrl-C is not raised: it gives what was said so far, with `finish="interrupted"`.
            Callers that answer many prompts must look at it.

        Raises:
            SettingsError: Prompt and answer do not fit, unless `allow_beyond`.
            NumericError: See `prefill`.
        """
        if not ids:
            raise ValueError("a prompt has at least one token")
        if not allow_beyond:
            refuse_overflow(len(ids), max_new_tokens, self.context_length, self.past)
        watch = StopWatch(self.loaded.tokenizer, stop) if stop else None
        run = _Run(self.loaded.tokenizer, max_new_tokens, frozenset(stop_ids), sampler, on_token, watch)
        try:
            self._say(run, ids, advance, query)
        except KeyboardInterrupt:
            run.finish = "interrupted"
        return run.result(prompt_tokens=len(ids), reused_tokens=self._reader.reused, kv_bytes=self.kv_bytes)

    def log_likelihoods(
        self,
        ids: Sequence[int],
        continuations: Sequence[Sequence[int]],
        *,
        query: Query | None = None,
    ) -> list[float]:
        """Natural logarithm of the probability of each continuation after `ids`, which are read once.

        Args:
            ids: The shared prompt, at least one token; what is held of it is not run again.
            continuations: Token ids, at least one each. Each is forgotten before the next one is run.
            query: As of `answer`.

        Raises:
            NumericError: See `prefill`.
        """
        if not ids:
            raise ValueError("a prompt has at least one token")
        first = self._reader.read(ids, None, query).float().log_softmax(-1)
        end = self._reader.mark()
        found = []
        for continuation in continuations:
            total = float(first[continuation[0]])
            for before, token in pairwise(continuation):
                total += float(self._reader.step(before).float().log_softmax(-1)[token])
            self._reader.back_to(end)
            found.append(total)
        return found

    def _say(self, run: _Run, ids: Sequence[int], advance: Advance | None, query: Query | None) -> None:
        run.accept(self._reader.read(ids, advance, query))
        while run.finish is None:
            run.accept(self._reader.step(run.ids[-1]))
        run.flush()


class _Run:
    """The state of one answer while it grows."""

    def __init__(
        self,
        tokenizer: Any,
        max_new_tokens: int,
        stop_ids: frozenset[int],
        sampler: Sampler,
        on_token: OnToken | None,
        watch: StopWatch | None,
    ) -> None:
        self.ids: list[int] = []
        self.finish: Finish | None = None
        self._started = time.perf_counter()
        self._first_token_at: float | None = None
        self._tokenizer = tokenizer
        self._left = max_new_tokens
        self._stop_ids = stop_ids
        self._sampler = sampler
        self._on_token = on_token
        self._stream = TextStream(tokenizer)
        self._watch = watch

    def accept(self, logits: Tensor) -> None:
        """Choose the next token and see whether it is the last."""
        token = self._sampler(logits)
        self._first_token_at = self._first_token_at or time.perf_counter()
        if token in self._stop_ids:
            self.finish = "eos"
            return
        self.ids.append(token)
        self._left -= 1
        if self._left == 0:
            self.finish = "length"
        if self._watch is not None and self._watch.is_met(token):
            self.finish = "stop"
        if self._on_token is not None:
            self._on_token(token, self._stream.push(token))

    def flush(self) -> None:
        """Hand over a character that was left unfinished."""
        if self._on_token is not None and (rest := self._stream.finish()):
            self._on_token(self.ids[-1], rest)

    def result(self, *, prompt_tokens: int, reused_tokens: int, kv_bytes: int) -> Answer:
        """What became of it; without a finish it was interrupted."""
        ended = time.perf_counter()
        first = self._first_token_at or ended
        return Answer(
            ids=self.ids,
            text=self._tokenizer.decode(
                self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            ),
            finish=self.finish or "interrupted",
            prompt_tokens=prompt_tokens,
            reused_tokens=reused_tokens,
            prefill_seconds=first - self._started,
            decode_seconds=ended - first,
            kv_bytes=kv_bytes,
        )
