"""One conversation as `chat` holds it: what is asked, what is read, what is said and shown."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longlora_cli.config import ChatConfig
from longlora_cli.console import Console
from longlora_cli.data.documents import find_sources, read_documents
from longlora_cli.data.encoding import safe_encoder
from longlora_cli.data.readers import kind_of
from longlora_cli.errors import DataError, Interrupted
from longlora_cli.generation.budget import Budget, free_bytes
from longlora_cli.generation.conversation import Conversation, Prompt
from longlora_cli.generation.kv_effect import Divergence, kv_divergence
from longlora_cli.generation.past import FULL_BITS
from longlora_cli.generation.reader import Query
from longlora_cli.generation.sampling import make_sampler
from longlora_cli.generation.session import Answer, Session, refuse_overflow, stop_ids

# Kinds whose text is meant and not their source.
_BOOKS = (".txt", ".md", ".epub", ".pdf")

# What a template writes around a question; retrieval does not search so many tokens before it.
_TURN_TOKENS = 16

# A shorter prompt is read before a bar could be drawn.
_BAR_TOKENS = 512


def checked_question(text: str) -> str:
    """Refuse what cannot be encoded: nothing, or bytes that a terminal sent which are no characters."""
    if not text.strip():
        raise DataError("the question is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"the question: character {error.start} is not UTF-8") from error
    return text


def read_texts(path: Path) -> list[tuple[str, str]]:
    """Name and text of a file, or of each document in a folder.

    What no document reader knows is read as plain text, and so are JSON, tables and HTML: a person asks
    about the file.

    Raises:
        DataError: Nothing there, or not UTF-8; the byte is told.
    """
    if path.is_dir() or kind_of(path) in _BOOKS or not path.exists():
        documents = read_documents(find_sources([str(path)], split="train"), seed=0)
        return [(Path(d.source).name, _as_text(d.content)) for d in documents]
    raw = path.read_bytes()
    try:
        return [(path.name, raw.decode("utf-8-sig"))]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8") from error


def _as_text(content: str | list[dict[str, str]]) -> str:
    if isinstance(content, str):
        return content
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in content)


class Chat:
    """One conversation with one model, and how its turns are shown.

    Args:
        config: Settings of the command.
        console: Gets the answers.
        notes: Gets everything else.
        conversation: The turns.
        session: The model and what it has read.
    """

    def __init__(
        self,
        config: ChatConfig,
        console: Console,
        notes: Console,
        conversation: Conversation,
        session: Session,
    ) -> None:
        self.console, self.notes = console, notes
        self.conversation, self.session = conversation, session
        self.max_new_tokens = config.max_new_tokens
        self.last: Answer | None = None
        self.divergence: Divergence | None = None
        self._stop_ids = stop_ids(session.loaded)
        self._sampler = make_sampler(temperature=config.temperature, top_p=config.top_p, seed=config.seed)

    def answer_once(self, prompt: Prompt) -> dict[str, Any]:
        """Answer one question and report it; what `--json` prints."""
        answer = self.answer(prompt)
        if answer.finish == "interrupted":
            raise Interrupted(f"interrupted after {len(answer.ids):,} tokens")
        past = self.session.past
        return {
            "text": answer.text,
            "finish": answer.finish,
            "prompt_tokens": answer.prompt_tokens,
            "new_tokens": len(answer.ids),
            "reused_tokens": answer.reused_tokens,
            "context_length": self.session.context_length,
            "kv_bits": past.kv_bits,
            "beacon": None if past.beacon is None else past.beacon.to_json(),
            "kv_bytes": answer.kv_bytes,
            "kv_divergence": None if self.divergence is None else asdict(self.divergence),
            "timings": {
                "prefill_seconds": answer.prefill_seconds,
                "decode_seconds": answer.decode_seconds,
                "prefill_tokens_per_second": answer.prefill_rate,
                "decode_tokens_per_second": answer.decode_rate,
            },
        }

    def budget(self, prompt: Prompt) -> Budget:
        """What a prompt will take beyond what the session holds."""
        needed = len(prompt.ids) + self.max_new_tokens
        kv_bytes = self.session.kv_bytes_for(needed)
        held = self.session.kv_bytes_for(self.session.reusable(prompt.ids))
        return Budget(
            prompt_tokens=len(prompt.ids),
            max_new_tokens=self.max_new_tokens,
            context_length=self.session.context_length,
            kv_bytes=kv_bytes,
            more_bytes=max(kv_bytes - held, 0),  # a window that closes gives memory back
            free_bytes=free_bytes(self.session.loaded.device),
        )

    def answer(self, prompt: Prompt) -> Answer:
        """Ask what the conversation made a prompt of, show the answer while it comes, and keep both.

        An answer that was stopped before its first token is not kept, and neither is its question.

        Raises:
            SettingsError: Too long for the context; nothing was run.
            ResourceError: Too large for the memory; nothing was run.
        """
        budget = self.budget(prompt)
        refuse_overflow(budget.prompt_tokens, budget.max_new_tokens, budget.context_length, self.session.past)
        if prompt.attachments or self.last is None:
            self.notes.print(budget.describe())
        budget.refuse_memory()
        self._measure_bits(prompt)
        answer = self._stream(prompt)
        if answer.ids or answer.finish != "interrupted":
            self.conversation.keep(prompt, answer.text, answer.ids)
        self.last = answer
        self.notes.print(self.meter(answer))
        return answer

    def _measure_bits(self, prompt: Prompt) -> None:
        """Tell once what the bits of keys and values change, as soon as a prompt is long enough to say so."""
        if self.divergence is None:
            self.divergence = kv_divergence(self.session.loaded, prompt.ids, self.session.past)
            if self.divergence is not None:
                self.notes.print(f"KV{self.kv_note}")

    @property
    def kv_note(self) -> str:
        """Bits of keys and values where they are not the model's own, and what they change."""
        bits, found = self.session.past.kv_bits, self.divergence
        if self.session.past.beacon is not None:
            return f"; {self.session.past.describe()}"
        if bits == FULL_BITS:
            return ""
        if found is None:
            return f", in {bits} bits"
        return (
            f" in {bits} bits: KL {found.kl:.1e} nats to full keys and values, "
            f"over the last {found.tokens} of {found.text_tokens:,} tokens"
        )

    def _stream(self, prompt: Prompt) -> Answer:
        new = len(prompt.ids) - self.session.reusable(prompt.ids)
        with ExitStack() as bar:
            advance = None
            if new >= _BAR_TOKENS:
                advance = bar.enter_context(self.notes.progress("Reading", total=new, unit="tokens"))

            def show(token: int, piece: str) -> None:
                bar.close()  # the bar ends where the answer begins
                self.console.stream(piece)

            answer = self.session.answer(
                prompt.ids,
                max_new_tokens=self.max_new_tokens,
                stop_ids=self._stop_ids,
                sampler=self._sampler,
                on_token=show,
                advance=advance,
                query=self._query(prompt),
            )
        self.console.stream("\n")
        return answer

    def _query(self, prompt: Prompt) -> Query | None:
        """What retrieval searches the past by: the user's newest question, without the texts read with it."""
        if self.session.past.retrieval is None:
            return None
        tokens = len(safe_encoder(self.session.loaded.tokenizer).encode_batch([prompt.question])[0])
        return Query(prompt.question, tokens + _TURN_TOKENS)

    def meter(self, answer: Answer) -> str:
        """One line under an answer: how full the context is, and what the answer cost."""
        used, limit = answer.prompt_tokens + len(answer.ids), self.session.context_length
        read = answer.prompt_tokens - answer.reused_tokens
        parts = [
            f"context {used:,} of {limit:,} ({used / limit:.0%})",
            f"read {read:,} at {answer.prefill_rate:,.0f} tok/s",
            f"reused {answer.reused_tokens:,} of {answer.prompt_tokens:,}",
            f"{len(answer.ids):,} new at {answer.decode_rate:,.1f} tok/s",
        ]
        if answer.finish == "length":
            parts.append(f"ended by --max-new-tokens {self.max_new_tokens:,}")
        if answer.finish == "interrupted":
            parts.append("stopped" if answer.ids else "stopped before the answer began; /retry asks again")
        return "[" + ", ".join(parts) + "]"
