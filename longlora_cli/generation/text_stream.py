"""Token ids to text while they arrive, without broken characters."""

from __future__ import annotations

from typing import Any

_BROKEN = "\ufffd"
# Two characters of four bytes each, written as single-byte tokens, leave at most 7 unfinished marks at the
# end. More of them are not the start of a character but bytes that never become one.
_MOST_BROKEN = 8


class TextStream:
    """Turns ids into pieces of text; the pieces joined are the text of all ids.

    A character may be spread over several tokens, and some tokenizers drop a space at the start of what they
    decode. So each step decodes the last shown tokens together with the new ones, and shows what came to it
    once it does not end inside a character. A step costs a few tokens' decoding however long the text is.

    Args:
        tokenizer: A fast tokenizer; its special tokens are left out of the text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._context: list[int] = []
        self._new: list[int] = []

    def push(self, token: int) -> str:
        """The text that is complete with this token; empty while a character is unfinished."""
        if token in self._special:
            return ""
        self._new.append(token)
        text = self._decode(self._context + self._new)
        unfinished = len(text) - len(text.rstrip(_BROKEN))
        if 0 < unfinished < _MOST_BROKEN:
            return ""
        return self._show(text)

    def finish(self) -> str:
        """What is left when no more tokens come: an unfinished character, as the replacement mark."""
        return self._show(self._decode(self._context + self._new)) if self._new else ""

    def _show(self, text: str) -> str:
        piece = text[len(self._decode(self._context)) :]
        self._context, self._new = self._new, []
        return piece

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
