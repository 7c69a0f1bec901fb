"""The project's generation engine as something that evaluation can ask."""

from __future__ import annotations

from collections.abc import Sequence

from longlora_cli.evaluation.generation import Answer, Question
from longlora_cli.generation.past import PLAIN, Past
from longlora_cli.generation.reader import Query
from longlora_cli.generation.session import Session, stop_ids
from longlora_cli.models.loading import LoadedModel

# Where a prompt's question cannot be told from its context, retrieval searches by the prompt's end.
_QUERY_TOKENS = 64


class SessionAnswerer:
    """Greedy answers from one session, which keeps the longest prefix that the next prompt shares.

    Args:
        loaded: The model, in eval mode.
        prefill_chunk: Tokens of a prompt read at one time.
        past: How what was read is kept.

    Raises:
        SettingsError: The model's past cannot be kept so.
    """

    def __init__(self, loaded: LoadedModel, *, prefill_chunk: int, past: Past = PLAIN) -> None:
        self._session = Session(loaded, prefill_chunk=prefill_chunk, past=past)
        self._stop_ids = stop_ids(loaded)

    def answer(self, ids: Sequence[int], max_new_tokens: int) -> Answer:
        """The likeliest continuation. Prompts beyond the model's length are read too: that is what "before"
        shows.

        Raises:
            KeyboardInterrupt: Ctrl-C; half an answer is no measurement.
            NumericError: The logits are not finite numbers.
        """
        return self._answer(ids, max_new_tokens, None)

    def answer_question(self, question: Question, max_new_tokens: int) -> Answer:
        """As `answer`, where retrieval searches the past by the question alone, as far as it can be told from it."""
        if self._session.past.retrieval is None:
            return self.answer(question.prompt, max_new_tokens)
        return self._answer(question.prompt, max_new_tokens, question.without_context)

    def _answer(self, ids: Sequence[int], max_new_tokens: int, asked: Sequence[int] | None) -> Answer:
        said = self._session.answer(
            list(ids),
            max_new_tokens=max_new_tokens,
            stop_ids=self._stop_ids,
            allow_beyond=True,
            query=self._query(ids, asked),
        )
        if said.finish == "interrupted":
            raise KeyboardInterrupt
        return Answer(said.ids, said.text, said.finish, said.reused_tokens, said.kv_bytes)

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
