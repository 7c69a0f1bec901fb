"""Which chat template a tokenizer renders with: its own, one by name, or a file (`--chat-template`).

The named ones lie in `templates/`, written from the vendors' descriptions, each with its source. A chosen template
replaces the tokenizer's own in memory; whoever saves the tokenizer beside an adapter saves it too, so that a run, its
checkpoints and what is merged from it render as it was trained.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError

from longlora_cli.errors import DataError, NotFoundError, SettingsError
from longlora_cli.models.template_sandbox import FAILURES, apply_template

OWN = "auto"
TEMPLATES = {
    "llama-2": "llama-2",
    "llama-3": "llama-3",
    "mistral": "mistral",
    "qwen": "chatml",
    "chatml": "chatml",
    "gemma": "gemma",
    "phi": "phi",
    "none": "none",
}
_FOLDER = Path(__file__).parent / "templates"
# The longest templates of models have 30 KB; a larger file is something else.
_LARGEST_BYTES = 1 << 18
# How the vendors here write control tokens. Other marks ([INST], <<SYS>>) are plain text to some tokenizers by design.
_CONTROL = re.compile(r"<\|[^\s|<>]+\|>|<(?:start|end)_of_turn>")
_PROBE = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]


def choose_template(tokenizer: Any, choice: str) -> None:
    """Give a tokenizer the chosen chat template, after checking that its control tokens are the tokenizer's.

    Args:
        tokenizer: A fast tokenizer; its `chat_template` is replaced, unless `choice` is `auto`.
        choice: `auto` (its own), a name of `TEMPLATES`, or the path of a Jinja file.

    Raises:
        SettingsError: An unknown name; or the tokenizer lacks a control token that the template writes.
        NotFoundError: There is no such file.
        DataError: The file is no UTF-8, no Jinja, too large, or fails on a question with an answer.
    """
    if choice == OWN:
        return
    named = choice in TEMPLATES
    text = _text_of(choice) if named else _read(choice)
    if choice == "none" and _begins_with_bos(tokenizer):
        text = "{{- bos_token -}}\n" + text
    if named and (missing := [name for name in _tokens_in(text) if not getattr(tokenizer, name)]):
        raise SettingsError(
            f"--chat-template {choice} needs a tokenizer with {missing[0]}; this model's has none",
            hint=f"These fit this model's tokenizer: {_fitting(tokenizer)}.",
        )
    before, tokenizer.chat_template = tokenizer.chat_template, text
    try:
        _refuse_foreign_tokens(tokenizer, choice, named=named)
    except Exception:
        tokenizer.chat_template = before
        raise


def _text_of(name: str) -> str:
    return (_FOLDER / f"{TEMPLATES[name]}.jinja").read_text(encoding="utf-8")


def _body(text: str) -> str:
    """A template without its comments."""
    return re.sub(r"\{#.*?#\}", "", text, flags=re.DOTALL)


def _tokens_in(text: str) -> list[str]:
    """Which of a tokenizer's own names for tokens a template uses."""
    return [name for name in ("bos_token", "eos_token") if name in _body(text)]


def _special(tokenizer: Any) -> set[str]:
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def _read(choice: str) -> str:
    path = Path(choice)
    if not path.is_file():
        if path.suffix or len(path.parts) > 1:
            raise NotFoundError(f"--chat-template {choice}: there is no such file")
        close = difflib.get_close_matches(choice, TEMPLATES, n=1)
        raise SettingsError(
            f"--chat-template {choice}: no template of this name"
            + (f"; did you mean {close[0]}?" if close else ""),
            hint=f"Write {OWN}, {', '.join(TEMPLATES)}, or the path of a .jinja file.",
        )
    if path.stat().st_size > _LARGEST_BYTES:
        raise DataError(
            f"{path}: {path.stat().st_size:,} bytes are no chat template; at most {_LARGEST_BYTES:,}"
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8") from error
    if not text.strip():
        raise DataError(f"{path}: the chat template is empty")
    return text


def _begins_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts BOS before a text."""
    ids = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _refuse_foreign_tokens(tokenizer: Any, choice: str, *, named: bool) -> None:
    """Raise when what the template writes as control tokens is plain text to the tokenizer.

    A named template needs all of them. Of a file the one that ends an answer is needed: without it a model never
    learns to stop; other marks may be meant as plain text, as Zephyr's <|user|> is.
    """
    special = _special(tokenizer)
    rendered = _render(tokenizer, choice)
    missing = [mark for mark in dict.fromkeys(_CONTROL.findall(rendered)) if mark not in special]
    after = rendered.rpartition("answer")[2].lstrip()
    ends = any(after.startswith(name) for name in special)
    if named and missing:
        raise SettingsError(
            f"--chat-template {choice} writes {', '.join(missing)}, which this model's tokenizer has not as "
            f"control tokens",
            rule="As plain text they would be learnt letter by letter, and no other program would know them.",
            hint=f"These fit this model's tokenizer: {_fitting(tokenizer)}.",
        )
    if not ends:
        end = after.split()[0] if after.split() else "nothing"
        raise SettingsError(
            f"--chat-template {choice} ends an answer with {end}, which is no control token of this model's tokenizer",
            rule="A model learns to stop by the token that ends its answers.",
            hint="Let the template write {{ eos_token }} after an assistant's content.",
        )


def _render(tokenizer: Any, choice: str) -> str:
    try:
        text = apply_template(tokenizer, _PROBE)
    except TemplateSyntaxError as error:
        raise DataError(f"{choice}:{error.lineno}: not a Jinja template: {error.message}") from error
    except FAILURES as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{choice}: the template fails on a question with an answer: {reason}") from error
    if "answer" not in text:
        raise DataError(f"{choice}: the template leaves out what the assistant says")
    return text


def _fitting(tokenizer: Any) -> str:
    """The named templates whose tokens a tokenizer has."""
    special, fitting = _special(tokenizer), [OWN]
    for name in TEMPLATES:
        text = _text_of(name).replace("' + message['role'] + '", "user")
        if set(_CONTROL.findall(_body(text))) <= special and all(
            getattr(tokenizer, token) for token in _tokens_in(text)
        ):
            fitting.append(name)
    return ", ".join(fitting)
