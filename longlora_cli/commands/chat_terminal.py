"""The conversation loop of `longlora chat`: read a line, answer or obey, until the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from longlora_cli.commands.chat_turns import Chat, checked_question, read_texts
from longlora_cli.errors import DataError, Interrupted, LongLoRAError, SettingsError
from longlora_cli.generation.budget import size
from longlora_cli.generation.session import refuse_overflow
from longlora_cli.storage import write_text

_QUOTES = '"""'


class _End(Exception):
    """The user wants to leave."""


class Terminal:
    """Reads what the user types, in a terminal or from a pipe.

    Args:
        chat: The conversation.
    """

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self._interactive = chat.console.is_interactive
        self._read_bytes = 0
        self._unanswered: str | None = None
        self._commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "help": ("show this list", self._help),
            "file": ("PATH: read a text with the next question", self._file),
            "system": ("TEXT: set the system message; without TEXT, remove it", self._system),
            "undo": ("take back the last question and answer, or a text not asked about yet", self._undo),
            "retry": ("ask the last question again", self._retry),
            "save": ("FILE: write the conversation as a line of JSON", self._save),
            "stats": ("show tokens, memory and speed", self._stats),
            "quit": ("leave", self._quit),
        }

    def converse(self) -> None:
        """Answer until the end of input or /quit.

        Raises:
            Interrupted: Ctrl-C twice without typing anything.
        """
        if self._interactive:
            # Without it the terminal itself edits the line and cuts it at 4,095 bytes.
            import readline  # noqa: F401

            self.chat.notes.print('/help lists the commands; """ begins and ends a text of several lines.')
        interrupts = 0
        while True:
            try:
                entry = self._entry()
            except EOFError:
                if self._interactive:
                    self.chat.notes.print()
                return
            except KeyboardInterrupt:
                interrupts += 1
                if interrupts == 2 or not self._interactive:
                    raise Interrupted("interrupted") from None
                self.chat.notes.print("\nCtrl-C again, or Ctrl-D, leaves.")
                continue
            interrupts = 0
            try:
                self._obey(*entry)
            except _End:
                return

    def _obey(self, entry: str, is_command: bool) -> None:
        """Answer or act; in a terminal, what goes wrong is told and the conversation goes on."""
        try:
            self._command(entry) if is_command else self._ask(entry)
        except (LongLoRAError, KeyboardInterrupt) as error:
            if not self._interactive:
                raise
            if isinstance(error, LongLoRAError):
                self.chat.console.error(error.lines(), error.exit_code)
            else:
                self.chat.notes.print("\nstopped")

    def _entry(self) -> tuple[str, bool]:
        """One line, or the lines between two triple quotes; and whether it may be a command."""
        line = self._line("> ")
        if not line.lstrip().startswith(_QUOTES):
            return line, line.startswith("/")
        lines = [line.lstrip()[len(_QUOTES) :]]
        while not lines[-1].rstrip().endswith(_QUOTES):
            lines.append(self._line("... "))
        lines[-1] = lines[-1].rstrip()[: -len(_QUOTES)]
        return "\n".join(lines).strip("\n"), False

    def _line(self, prompt: str) -> str:
        if self._interactive:
            return input(prompt)
        raw = sys.stdin.buffer.readline()
        if not raw:
            raise EOFError
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"standard input: byte {self._read_bytes + error.start} is not UTF-8") from error
        self._read_bytes += len(raw)
        return text.rstrip("\r\n")

    def _command(self, entry: str) -> None:
        name, _, rest = entry[1:].partition(" ")
        if name not in self._commands:
            close = get_close_matches(name, self._commands, n=1)
            raise SettingsError(
                f"there is no command /{name}" + (f"; did you mean /{close[0]}?" if close else ""),
                hint='Text that begins with a slash goes between """ and """.',
            )
        self._commands[name][1](rest.strip())

    def _ask(self, question: str) -> None:
        if not question.strip():
            return
        self._unanswered = checked_question(question)
        answer = self.chat.answer(self.chat.conversation.ask(question))
        if answer.ids or answer.finish != "interrupted":
            self._unanswered = None

    def _help(self, rest: str) -> None:
        for name, (help_text, _) in self._commands.items():
            self.chat.notes.print(f"  /{name:8}{help_text}")
        self.chat.notes.print("  Ctrl-C   stop the answer and keep what was said; twice at the prompt: leave")

    def _file(self, rest: str) -> None:
        if not rest:
            raise SettingsError("/file needs a PATH")
        conversation, chat = self.chat.conversation, self.chat
        before = list(conversation.pending)
        try:
            files = [conversation.attach(*text) for text in read_texts(Path(rest).expanduser())]
            tokens = len(conversation.ask("").ids)
            refuse_overflow(tokens, chat.max_new_tokens, chat.session.context_length, chat.session.past)
        except BaseException:
            conversation.pending = before
            raise
        for file in files:
            chat.notes.print(f"{file.name}: {file.tokens:,} tokens, read with your next question")

    def _system(self, rest: str) -> None:
        before = self.chat.conversation.system
        self.chat.conversation.system = checked_question(rest) if rest else None
        try:
            self.chat.conversation.ask("")
        except DataError:  # not every template knows system messages
            self.chat.conversation.system = before
            raise
        self.chat.notes.print("system message set" if rest else "system message removed")

    def _undo(self, rest: str) -> None:
        conversation = self.chat.conversation
        self._unanswered = None
        if conversation.pending:
            file = conversation.pending.pop()
            self.chat.notes.print(f"{file.name} will not be read")
            return
        prompt = conversation.undo()
        if prompt is None:
            raise SettingsError("there is nothing to undo")
        kept = "".join(f"; {file.name} is read with the next question" for file in prompt.attachments)
        self.chat.notes.print(f"the last question and its answer are gone{kept}")

    def _retry(self, rest: str) -> None:
        question = self._unanswered
        if question is None:
            prompt = self.chat.conversation.undo()
            if prompt is None:
                raise SettingsError("there is no question to ask again")
            question = prompt.question
        self._ask(question)

    def _save(self, rest: str) -> None:
        if not rest:
            raise SettingsError("/save needs a FILE")
        path = Path(rest).expanduser()
        if path.exists():
            raise SettingsError(f"{path} exists already", rule="Nothing is overwritten.")
        messages = self.chat.conversation.messages()
        write_text(path, json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        self.chat.notes.print(f"{path}: {len(messages)} messages")

    def _stats(self, rest: str) -> None:
        session, last = self.chat.session, self.chat.last
        held = len(session.ids)
        tell = self.chat.notes.print
        tell(
            f"  context  {held:,} of {session.context_length:,} tokens ({held / session.context_length:.0%})"
        )
        tell(
            f"  KV       {size(session.kv_bytes)}, {size(session.kv_bytes_per_token)} a token{self.chat.kv_note}"
        )
        tell(f"  turns    {self.chat.conversation.turns}")
        if last is not None:
            tell(f"  last     {self.chat.meter(last)[1:-1]}")

    def _quit(self, rest: str) -> NoReturn:
        raise _End
