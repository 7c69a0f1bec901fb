"""The project's generation engine as something that evaluation can ask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from longlora_cli.errors import SettingsError
from longlora_cli.evaluation.batching import Batching
from longlora_cli.evaluation.generation import Answer
from longlora_cli.generation.batch import answer_together
from longlora_cli.generation.prefill import depends_on_length
from longlora_cli.generation.requests import Request
from longlora_cli.generation.session import Answer as Said
from longlora_cli.generation.session import Session, stop_ids
from longlora_cli.models.loading import LoadedModel

# Keys and values of no more tokens than one prompt of 32K; on two CPU cores 16 rows were faster than 8 up to 512
# tokens, and from 2,048 on nothing was gained any more.
_AUTO = Batching(rows=16, tokens=32_768)


def choose_batching(asked: int | Literal["auto"], loaded: LoadedModel) -> Batching | None:
    """How many questions are answered together; None: each by itself.

    Args:
        asked: `--batch-size`.
        loaded: The model.

    Raises:
        SettingsError: More than one, and the model's positions change with the length of a prompt.
    """
    if asked == 1 or (asked == "auto" and depends_on_length(loaded)):
        return None
    if depends_on_length(loaded):
        raise SettingsError(
            f"--batch-size {asked}: the model's positions are {loaded.rope.describe()}",
            rule="Positions that change with a prompt's length are those of one prompt.",
            hint="Leave --batch-size out.",
        )
    return _AUTO if asked == "auto" else Batching(asked)


class SessionAnswerer:
    """Greedy answers from one KV cache, which keeps the longest prefix that the next prompt shares.

    Args:
        loaded: The model, in eval mode.
        prefill_chunk: Tokens of a prompt read at one time.
        batching: Which questions are answered together, without that cache; None: each by itself.
    """

    def __init__(self, loaded: LoadedModel, *, prefill_chunk: int, batching: Batching | None = None) -> None:
        self._session = Session(loaded, prefill_chunk=prefill_chunk)
        self._loaded, self._prefill_chunk, self.batching = loaded, prefill_chunk, batching
        self._stop_ids = stop_ids(loaded)

    def answer(self, ids: Sequence[int], max_new_tokens: int, stop: Sequence[str] = ()) -> Answer:
        """The likeliest continuation. Prompts beyond the model's length are read too: that is what "before"
        shows.

        Raises:
            KeyboardInterrupt: Ctrl-C; half an answer is no measurement.
            NumericError: The logits are not finite numbers.
        """
        said = self._session.answer(
            list(ids), max_new_tokens=max_new_tokens, stop_ids=self._stop_ids, stop=stop, allow_beyond=True
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
        return self._session.log_likelihoods(list(ids), continuations)


def _as_answer(said: Said) -> Answer:
    if said.finish == "interrupted":
        raise KeyboardInterrupt
    return Answer(said.ids, said.text, said.finish, said.reused_tokens)
