"""The project's generation engine as something that evaluation can ask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from longlora_cli.errors import SettingsError
from longlora_cli.evaluation.batching import Batching
from longlora_cli.evaluation.generation import Answer, Question
from longlora_cli.generation.batch import answer_together, has_window
from longlora_cli.generation.cache import cache_bytes_for, depends_on_length
from longlora_cli.generation.past import PLAIN, Past
from longlora_cli.generation.reader import Query
from longlora_cli.generation.requests import Request
from longlora_cli.generation.session import Answer as Said
from longlora_cli.generation.session import Session, stop_ids
from longlora_cli.models.loading import LoadedModel

# Where a prompt's question cannot be told from its context, retrieval searches by the prompt's end.
_QUERY_TOKENS = 64
# Keys and values of no more tokens than one prompt of 32K; on two CPU cores 16 rows were faster than 8 up to 512
# tokens, and from 2,048 on nothing was gained any more. A GPU waits for launches while it decodes one row
# (SmolLM2 after 32K on an H100: 0.30 s a question of 8 new tokens, where reading the 32K took 0.15 s), so there keys
# and values may take a quarter of what is free: a layer's are copied when they grow. A text that all rows begin with
# counts once where it is held once.
_AUTO_ROWS, _AUTO_TOKENS = 16, 32_768
_AUTO_GPU_SHARE = 0.25


def choose_batching(asked: int | Literal["auto"], loaded: LoadedModel, past: Past = PLAIN) -> Batching | None:
    """How many questions are answered together; None: each by itself.

    Args:
        asked: `--batch-size`.
        loaded: The model.
        past: How what was read is kept; only a plain cache takes several rows.

    Raises:
        SettingsError: More than one, and the model's positions change with the length of a prompt, or its past is
            compressed.
    """
    alone = depends_on_length(loaded) or past != PLAIN
    if asked == 1 or (asked == "auto" and alone):
        return None
    if past != PLAIN:
        raise SettingsError(
            f"--batch-size {asked}: questions are answered together on a plain cache alone",
            rule="Beacons and a quantized cache hold one text at a time.",
            hint="Leave --batch-size out.",
        )
    if alone:
        raise SettingsError(
            f"--batch-size {asked}: the model's positions are {loaded.rope.describe()}",
            rule="Positions that change with a prompt's length are those of one prompt.",
            hint="Leave --batch-size out.",
        )
    shares = not has_window(loaded)
    return Batching(_AUTO_ROWS, _auto_tokens(loaded), shares) if asked == "auto" else Batching(asked)


def _auto_tokens(loaded: LoadedModel) -> int:
    """Tokens of all rows together for which there is memory."""
    if loaded.device.type != "cuda":
        return _AUTO_TOKENS
    free_bytes, _ = torch.cuda.mem_get_info(loaded.device)
    element_bytes = 4 if loaded.dtype == "fp32" else 2
    each = cache_bytes_for(loaded.facts, 1, element_bytes=element_bytes)
    return max(_AUTO_TOKENS, int(_AUTO_GPU_SHARE * free_bytes) // each)


class SessionAnswerer:
    """Greedy answers from one session, which keeps the longest prefix that the next prompt shares.

    Args:
        loaded: The model, in eval mode.
        prefill_chunk: Tokens of a prompt read at one time.
        past: How what was read is kept.
        batching: Which questions are answered together, without that cache; None: each by itself.

    Raises:
        SettingsError: The model's past cannot be kept so.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        prefill_chunk: int,
        past: Past = PLAIN,
        batching: Batching | None = None,
    ) -> None:
        self._session = Session(loaded, prefill_chunk=prefill_chunk, past=past)
        self._loaded, self._prefill_chunk, self.batching = loaded, prefill_chunk, batching
        self._stop_ids = stop_ids(loaded)

    def answer(self, ids: Sequence[int], max_new_tokens: int, stop: Sequence[str] = ()) -> Answer:
        """The likeliest continuation. Prompts beyond the model's length are read too: that is what "before"
        shows.

        Raises:
            KeyboardInterrupt: Ctrl-C; half an answer is no measurement.
            NumericError: The logits are not finite numbers.
        """
        return self._answer(ids, max_new_tokens, stop, None)

    def answer_question(self, question: Question, max_new_tokens: int) -> Answer:
        """As `answer`, where retrieval searches the past by the question alone, as far as it can be told from it."""
        if self._session.past.retrieval is None:
            return self.answer(question.prompt, max_new_tokens, question.stop)
        return self._answer(question.prompt, max_new_tokens, question.stop, question.without_context)

    def _answer(
        self, ids: Sequence[int], max_new_tokens: int, stop: Sequence[str], asked: Sequence[int] | None
    ) -> Answer:
        said = self._session.answer(
            list(ids),
            max_new_tokens=max_new_tokens,
            stop_ids=self._stop_ids,
            stop=stop,
            allow_beyond=True,
            query=self._query(ids, asked),
        )
        return _as_answer(said)

    def answer_together(self, requests: Sequence[Request]) -> list[Answer]:
        """The same for several prompts, in one batch."""
        found = answer_together(
            self._loaded, requests, stop_ids=self._stop_ids, prefill_chunk=self._prefill_chunk
        )
        return [_as_answer(said) for said in found]

    def log_likelihoods(self, ids: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[float]:
        """Natural logarithm of the probability of each continuation; `ids` are read once."""
        return self._session.log_likelihoods(list(ids), continuations, query=self._query(ids, None))

    def _query(self, ids: Sequence[int], asked: Sequence[int] | None) -> Query | None:
        if self._session.past.retrieval is None:
            return None
        own = list(ids[-_QUERY_TOKENS:] if asked is None else asked)
        tokenizer = self._session.loaded.tokenizer
        text = tokenizer.decode(own, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Query(text, len(own))


def _as_answer(said: Said) -> Answer:
    if said.finish == "interrupted":
        raise KeyboardInterrupt
    return Answer(said.ids, said.text, said.finish, said.reused_tokens, said.kv_bytes)
