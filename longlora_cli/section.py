"""What settings are declared with: `setting`, one of them, and `Section`, a group that refuses what is not in it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def setting(default: Any, help: str, *, short: str = "", positional: bool = False, **checks: Any) -> Any:
    """Declare one setting. `default=...` makes it required; `checks` are pydantic's (`ge`, `gt`, `le`, `lt`)."""
    return Field(
        default, description=help, json_schema_extra={"short": short, "positional": positional}, **checks
    )


class Section(BaseModel):
    """A frozen group of settings that knows no other keys."""

    # Schemas are built at the first use of a config, not at import: help needs none, and they take 30 ms.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), defer_build=True)

    def module(self, command: str) -> str:
        """The module under `commands` that runs these settings: the command's own, or a part that needs no torch."""
        return command

    def given(self, name: str) -> bool:
        """True when the user gave this setting, rather than leaving its default."""
        return name in self.model_fields_set

    def needs(self, name: str, condition: bool, rule: str) -> None:
        """Refuse a given setting that would have no effect."""
        if self.given(name) and not condition:
            raise ValueError(f"--{name.replace('_', '-')} has no effect here: {rule}")

    def allows_only(self, mode: str, *others: str) -> None:
        """Refuse every given setting but `others` and `mode`, which asks for something else than the usual work."""
        for name in sorted(self.model_fields_set - {mode, *others}):
            self.needs(name, False, f"--{mode.replace('_', '-')} reads a finished evaluation")
