"""`longlora chat`: one question, or a conversation, over long documents."""

from __future__ import annotations

import sys
from typing import Any

from longlora_cli.beacon.loading import load_model
from longlora_cli.commands.chat_terminal import Terminal
from longlora_cli.commands.chat_turns import Chat, checked_question, read_texts
from longlora_cli.config import ChatConfig
from longlora_cli.console import Console, quiet_libraries
from longlora_cli.errors import DataError, SettingsError
from longlora_cli.generation.budget import Budget, ModelOutline, free_bytes, outline_model
from longlora_cli.generation.conversation import Conversation
from longlora_cli.generation.past import Past, past_of
from longlora_cli.generation.reader_choice import held_bytes_for
from longlora_cli.generation.session import Session, refuse_overflow
from longlora_cli.models.tokenizer import was_trained_otherwise


def run(config: ChatConfig, console: Console, *, dry_run: bool) -> dict[str, Any]:
    """Answer one question, or hold a conversation until its end.

    Texts are read and counted before weights are loaded, so that what cannot work is refused at once.

    Raises:
        SettingsError: The prompt does not fit the context, or `--json` without a question.
        DataError: A file that is missing or not UTF-8; a model without a chat template.
        ResourceError: Keys and values would not fit the memory.
        Interrupted: Ctrl-C, after what was said so far is shown.
    """
    if console.json_mode and config.prompt is None and not dry_run:
        raise SettingsError(
            "--json needs a question", hint="Give it with -p TEXT, or -p - for standard input."
        )
    # In a pipe the answer alone goes to standard output; a console in JSON mode tells the rest on standard
    # error.
    notes = console if console.rich.is_terminal and not console.json_mode else Console(json_mode=True)
    question = None if config.prompt is None else _question(config.prompt)
    texts = [text for path in config.file for text in read_texts(path)]
    outline = outline_model(config, config, adapter=config.adapter, context_length=config.max_length)
    quiet_libraries()  # now that transformers is imported
    if was_trained_otherwise(outline.source.adapter, outline.tokenizer):
        console.warn(f"{config.model} was trained with another chat template than {config.chat_template}")
    conversation = Conversation(outline.tokenizer, config.system)
    files = [conversation.attach(name, text) for name, text in texts]
    for file in files:
        notes.print(f"{file.name}: {file.tokens:,} tokens")
    prompt = conversation.ask(question or "")
    past = past_of(config, outline.source)
    budget = _first_budget(len(prompt.ids), config, outline, past)
    if dry_run:
        notes.print(budget.describe())
        return _plan(config, outline, budget, past, {file.name: file.tokens for file in files})
    refuse_overflow(budget.prompt_tokens, budget.max_new_tokens, budget.context_length, past)
    loaded = load_model(config, config, adapter=config.adapter, context_length=config.max_length)
    session = Session(
        loaded,
        prefill_chunk=config.prefill_chunk,
        context_length=config.max_length,
        past=past,
    )
    chat = Chat(config, console, notes, conversation, session)
    if question is not None:
        return chat.answer_once(prompt)
    Terminal(chat).converse()
    return {"turns": conversation.turns}


def _question(prompt: str) -> str:
    text = prompt
    if prompt == "-":
        raw = sys.stdin.buffer.read()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"standard input: byte {error.start} is not UTF-8") from error
    return checked_question(text)


def _first_budget(prompt_tokens: int, config: ChatConfig, outline: ModelOutline, past: Past) -> Budget:
    """The budget of the first question; weights are still to be loaded."""
    needed = prompt_tokens + config.max_new_tokens
    kv_bytes = held_bytes_for(
        past,
        outline.facts,
        needed,
        element_bytes=outline.element_bytes,
        positions=outline.positions,
    )
    return Budget(
        prompt_tokens=prompt_tokens,
        max_new_tokens=config.max_new_tokens,
        context_length=config.max_length or past.readable(outline.context_length, outline.positions),
        kv_bytes=kv_bytes,
        more_bytes=kv_bytes + outline.weights_bytes,
        free_bytes=free_bytes(outline.device),
    )


def _plan(
    config: ChatConfig, outline: ModelOutline, budget: Budget, past: Past, files: dict[str, int]
) -> dict[str, Any]:
    return {
        "dry_run": True,
        "model": config.model,
        "base": outline.source.base,
        "adapter": str(outline.source.adapter) if outline.source.adapter else None,
        "files": files,
        "prompt_tokens": budget.prompt_tokens,
        "max_new_tokens": budget.max_new_tokens,
        "needed_tokens": budget.needed_tokens,
        "context_length": budget.context_length,
        "kv_bits": config.kv_bits,
        "beacon": None if past.beacon is None else past.beacon.to_json(),
        "kv_bytes": budget.kv_bytes,
        "weights_bytes": outline.weights_bytes,
        "free_bytes": budget.free_bytes,
        "fits_context": budget.fits_context,
        "fits_memory": budget.fits_memory,
    }
