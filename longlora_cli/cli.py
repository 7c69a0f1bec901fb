"""The five commands, `--version`, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import typer

from longlora_cli import __version__
from longlora_cli.console import Console
from longlora_cli.errors import Interrupted, LongLoRAError, ResourceError, SettingsError

COMMANDS = {
    "prepare": "documents and chats -> chunked, packed training data",
    "train": "base model + data -> a run: adapter, checkpoints, metrics",
    "eval": "base or run -> perplexity by position, passkey, needle, generation",
    "chat": "base or run -> a conversation over long documents",
    "merge": "adapters, runs, models -> one plain model folder",
}
# Typer ships its own Click and exports only this subclass of its usage error.
_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]


def build_app(arguments: list[str]) -> typer.Typer:
    """The Typer app. Only the named command gets its flags, so that help needs no pydantic for the others."""
    app = typer.Typer(
        help="Longer context for open language models, and the proof that it worked.",
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(invoke_without_command=True)
    def root(
        version: bool = typer.Option(False, "--version", help="Print the version and exit."),
    ) -> None:
        if version:
            sys.stdout.write(f"longlora {__version__}\n")
            raise typer.Exit

    for name, summary in COMMANDS.items():
        if name == _command_of(arguments):
            from longlora_cli.options import add_command

            add_command(app, name, summary)
        else:
            app.command(name, help=summary)(lambda: None)
    return app


def _command_of(arguments: list[str]) -> str | None:
    return next((a for a in arguments if not a.startswith("-")), None)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run one command and leave the process with its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    json_mode, debug = "--json" in arguments, "--debug" in arguments
    try:
        sys.exit(_run(arguments))
    except LongLoRAError as error:
        if debug:
            raise
        Console(json_mode=json_mode).error(error.lines(), error.exit_code)
        sys.exit(error.exit_code)


def _run(arguments: list[str]) -> int:
    """Run and translate what other libraries raise into our errors; anything else is a bug and keeps its traceback."""
    name = _command_of(arguments)
    if name in COMMANDS:
        # pydantic looks through every installed package for plugins at import: 19 ms of each help page.
        os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
        from longlora_cli.options import expand_lists

        arguments = expand_lists(name, arguments)
    try:
        code = build_app(arguments)(arguments, prog_name="longlora", standalone_mode=False)
    except _USAGE_ERROR as error:
        command = f" {name}" if name in COMMANDS else ""
        raise SettingsError(
            error.format_message(),
            hint=f"See longlora{command} --help.",  # type: ignore[attr-defined]
        ) from error
    except typer.Abort as error:
        raise Interrupted("interrupted") from error
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted") from error
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of our pipe has gone
        return 0
    except MemoryError as error:
        raise ResourceError("out of memory", hint="Use a shorter --max-length or a smaller model.") from error
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, named so that torch is not imported here
            raise
        raise ResourceError(
            f"the GPU is out of memory: {str(error).splitlines()[0]}",
            hint="Use a shorter length, a smaller --batch-size, or a --gpu-memory to plan for less.",
        ) from error
    return code if isinstance(code, int) else 0
