"""Typed errors: what a user can act on, and the exit code each kind ends the process with.

LongLoRAError            1   a bug of ours, or an error no other kind fits
  SettingsError          2   flags, recipe keys or environment that cannot be used
  DataError              2   documents, chats or prepared data that cannot be used
  NotFoundError          3   a file, model or dataset that is not there, or needs the network
  IntegrityError         4   a folder whose bytes are not what its manifest says
  IncompatibleError      4   parts that do not belong together
  ResourceError          5   out of memory or disk
  NumericError           6   a loss or gradient that is not a finite number
  SecurityError          7   refused, because following the input could run foreign code
  Interrupted          130   Ctrl-C
  Terminated           143   SIGTERM, after saving
"""

from __future__ import annotations


class LongLoRAError(Exception):
    """One failure, told in at most three lines; of a faulty file in one line a fault.

    Args:
        message: What is wrong, with the values. One line.
        rule: The rule that was broken. One line, optional; or the other faults, a line each.
        hint: What to type or change instead. One line, optional.
    """

    exit_code = 1

    def __init__(self, message: str, *, rule: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.rule = rule
        self.hint = hint

    def lines(self) -> list[str]:
        """The message, then the rule and the hint where there are any."""
        return [self.message, *(self.rule or "").splitlines(), *([self.hint] if self.hint else [])]


class SettingsError(LongLoRAError):
    """Settings that cannot be used: misspelt, out of range, or without effect together."""

    exit_code = 2


class DataError(LongLoRAError):
    """Input data that cannot be used; the message starts with `file:line:` where there is one."""

    exit_code = 2


class NotFoundError(LongLoRAError):
    """Something named by the user is not there."""

    exit_code = 3


class IntegrityError(LongLoRAError):
    """A folder is incomplete or its content differs from its manifest."""

    exit_code = 4


class IncompatibleError(LongLoRAError):
    """Two artifacts that do not belong together."""

    exit_code = 4


class ResourceError(LongLoRAError):
    """Memory or disk does not suffice."""

    exit_code = 5


class NumericError(LongLoRAError):
    """A loss or gradient became infinite or not a number; the weights were not touched by it."""

    exit_code = 6


class SecurityError(LongLoRAError):
    """The input asks for something that could run foreign code."""

    exit_code = 7


class Interrupted(LongLoRAError):
    """The user pressed Ctrl-C."""

    exit_code = 130


class Terminated(LongLoRAError):
    """The process was asked to end and saved its state first."""

    exit_code = 143
