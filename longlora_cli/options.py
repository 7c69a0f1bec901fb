"""Turn a config class into a command: a field is a flag, a recipe key, an environment variable and a help line.

Values come from, in rising order: the default, the recipe's block of this command, `LONGLORA_*`, the flag. All of
them meet in one pydantic model, so that a value is read and checked the same way wherever it was written.
"""

from __future__ import annotations

import difflib
import inspect
import os
import types
import typing
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from longlora_cli import config as configs
from longlora_cli import values
from longlora_cli.console import Console, quiet_libraries
from longlora_cli.errors import DataError, NotFoundError, SettingsError
from longlora_cli.section import Section

CONFIGS: dict[str, type[Section]] = {
    "prepare": configs.PrepareConfig,
    "train": configs.TrainConfig,
    "eval": configs.EvalConfig,
    "chat": configs.ChatConfig,
    "merge": configs.MergeConfig,
}
ENVIRONMENT = "LONGLORA_"


def flag_of(name: str) -> str:
    """The flag of a setting: `max_length` -> `--max-length`."""
    return "--" + name.replace("_", "-")


def _is_list(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is list


def _is_switch(field: FieldInfo) -> bool:
    return field.annotation is bool


def _metavar(field: FieldInfo) -> str:
    kind: Any = field.annotation
    metadata = list(field.metadata)
    if get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(a for a in get_args(kind) if a is not type(None))
    if get_origin(kind) is Annotated:
        metadata += kind.__metadata__
    for mark in metadata:
        if (written := values.METAVARS.get(getattr(mark, "func", None))) is not None:
            return written
    if get_origin(kind) is Literal:
        return "|".join(str(a) for a in get_args(kind))
    if get_origin(kind) is list:
        return "A,B,..." if get_args(kind)[0] is not Path else "PATH ..."
    names: dict[Any, str] = {int: "N", float: "X", Path: "PATH", str: "TEXT"}
    return names.get(kind, "TEXT")


def _help(field: FieldInfo) -> str:
    text = field.description or ""
    if field.is_required():
        return f"{text} [required]"
    default = field.default
    if default is None or default == [] or _is_switch(field):
        return text
    shown = ",".join(str(d) for d in default) if isinstance(default, list) else default
    return f"{text} [default: {shown}]"


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    extra = typing.cast("dict[str, Any]", field.json_schema_extra)
    kind: Any = bool if _is_switch(field) else list[str] if _is_list(field) else str
    if extra["positional"]:
        info = typer.Argument(help=_help(field), metavar=f"{name.upper()}...", show_default=False)
    elif _is_switch(field):
        on, off = flag_of(name), flag_of(f"no_{name}")
        suffix = f" [default: {'on' if field.default else 'off'}]"
        info = typer.Option(f"{on}/{off}", help=_help(field) + suffix, show_default=False)
    else:
        flags = [flag_of(name), *([extra["short"]] if extra["short"] else [])]
        info = typer.Option(*flags, help=_help(field), metavar=_metavar(field), show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info]
    )


_SHARED = [
    (
        "recipe",
        Path,
        typer.Option("--recipe", "-r", help="YAML file of settings; flags win.", metavar="FILE"),
    ),
    ("json_mode", bool, typer.Option("--json", help="Print one JSON object, also on failure.")),
    (
        "dry_run",
        bool,
        typer.Option("--dry-run", help="Check everything, say what would be done, write nothing."),
    ),
    ("debug", bool, typer.Option("--debug", help="Show the traceback of an error.")),
]


def add_command(app: typer.Typer, name: str, summary: str) -> None:
    """Register a command; its module, and with it torch, is imported only when the command runs."""
    config_class = CONFIGS[name]
    parameters = [_parameter(n, f) for n, f in config_class.model_fields.items()]
    parameters += [
        inspect.Parameter(
            n,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if kind is Path else False,
            annotation=Annotated[kind | None if kind is Path else kind, info],
        )
        for n, kind, info in _SHARED
    ]

    def run(**values: Any) -> None:
        recipe, json_mode = values.pop("recipe"), values.pop("json_mode")
        dry_run, _ = values.pop("dry_run"), values.pop("debug")
        console = Console(json_mode=json_mode)
        settings = resolve(name, values, recipe)
        quiet_libraries()  # what libraries say while they are imported
        module = import_module(f"longlora_cli.commands.{settings.module(name)}")
        quiet_libraries()  # what needs them imported to be turned off
        entry: Callable[..., dict[str, Any]] = module.run
        console.result(entry(settings, console, dry_run=dry_run))

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command(name, help=f"{config_class.__doc__}\n\n{summary}")(run)


def resolve(command: str, flags: dict[str, Any], recipe: Path | None = None) -> Any:
    """Build a command's config from recipe, environment and flags.

    Args:
        command: One of `CONFIGS`.
        flags: Field name -> value; None where the flag was not given.
        recipe: YAML file, or the name of a shipped recipe.

    Raises:
        SettingsError: Unknown key, unusable value or a combination without effect; the source is named.
        NotFoundError: No such recipe.
    """
    config_class = CONFIGS[command]
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for key, (value, place) in (read_recipe(recipe, command) if recipe else {}).items():
        values[key], sources[key] = value, f"{place}: {key}"
    for key, value in _from_environment(config_class).items():
        values[key], sources[key] = value, f"{ENVIRONMENT}{key.upper()}"
    for key, value in flags.items():
        if value is not None:
            values[key], sources[key] = value, flag_of(key)
    try:
        return config_class(**values)
    except ValidationError as error:
        raise _settings_error(error, config_class, sources) from error


def _settings_error(
    error: ValidationError, config_class: type[Section], sources: dict[str, str]
) -> SettingsError:
    lines = []
    for fault in error.errors(include_url=False):
        message = fault["msg"].removeprefix("Value error, ")
        name = str(fault["loc"][0]) if fault["loc"] else ""
        if fault["type"] == "missing":
            field = config_class.model_fields[name]
            positional = typing.cast("dict[str, Any]", field.json_schema_extra)["positional"]
            what = f"nothing given for {name.upper()}" if positional else f"{flag_of(name)} is missing"
            lines.append(f"{what} ({field.description})")
        elif name:
            value = fault["input"]
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            lines.append(f"{sources.get(name, flag_of(name))} {shown}: {message[:1].lower() + message[1:]}")
        else:
            lines.append(message)
    return SettingsError(lines[0], rule="; ".join(lines[1:]) or None)


def _from_environment(config_class: type[Section]) -> dict[str, Any]:
    everywhere = {name for c in CONFIGS.values() for name in c.model_fields}
    found: dict[str, Any] = {}
    for variable, value in os.environ.items():
        if not variable.startswith(ENVIRONMENT):
            continue
        name = variable.removeprefix(ENVIRONMENT).lower()
        if name not in everywhere:
            raise SettingsError(f"{variable} is not a setting{_did_you_mean(name, everywhere, ENVIRONMENT)}")
        if name in config_class.model_fields:
            found[name] = value
    return found


def _did_you_mean(name: str, known: typing.Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    if not close:
        return ""
    return f"; did you mean {prefix}{close[0].upper() if prefix else close[0]}?"


def read_recipe(path: Path, command: str) -> dict[str, tuple[Any, str]]:
    """Read one command's block of a recipe: key -> (value, `file:line`).

    A recipe is a YAML mapping from command names to mappings of settings; one file can hold a whole path from
    `prepare` to `merge`. All blocks are checked for unknown keys, not only the one that is used.

    Raises:
        NotFoundError: No such file and no shipped recipe of that name.
        DataError: Not YAML, or not a mapping.
        SettingsError: A key that no command or setting has.
    """
    import yaml

    path = _find_recipe(path)
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise DataError(f"{path}:{line}: not YAML: {error.problem}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8") from error
    blocks = _mapping(root, path)
    found: dict[str, tuple[Any, str]] = {}
    for block, (node, line) in blocks.items():
        if block not in CONFIGS:
            hint = _did_you_mean(block, CONFIGS)
            raise SettingsError(
                f"{path}:{line}: unknown command {block!r}{hint}",
                rule=f"A recipe maps commands ({', '.join(CONFIGS)}) to their settings.",
            )
        for key, (value, key_line) in _mapping(node, path).items():
            if key not in CONFIGS[block].model_fields:
                hint = _did_you_mean(key, CONFIGS[block].model_fields)
                raise SettingsError(f"{path}:{key_line}: unknown key {key!r} in {block}{hint}")
            if block == command:
                plain = yaml.constructor.SafeConstructor().construct_document(value)
                found[key] = (plain, f"{path}:{key_line}")
    return found


def _find_recipe(path: Path) -> Path:
    if path.is_file():
        return path
    shipped = Path(__file__).parent / "recipes" / path.name
    if path.parent == Path() and shipped.is_file():
        return shipped
    names = sorted(p.name for p in shipped.parent.glob("*.yaml"))
    raise NotFoundError(
        f"there is no recipe {path}", hint=f"Shipped recipes: {', '.join(names)}." if names else None
    )


def _mapping(node: Any, path: Path) -> dict[str, tuple[Any, int]]:
    """The entries of a YAML mapping node: key -> (value node, line)."""
    if node is None:
        return {}
    if node.id != "mapping":
        raise DataError(f"{path}:{node.start_mark.line + 1}: a mapping of keys to values is needed here")
    entries: dict[str, tuple[Any, int]] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        name = str(key.value).replace("-", "_")
        if name in entries:
            raise DataError(f"{path}:{line}: key {key.value!r} is given twice")
        entries[name] = (value, line)
    return entries


def write_recipe(command: str, settings: Section) -> str:
    """The YAML of a recipe that repeats this command with exactly these settings."""
    import yaml

    values = settings.model_dump(mode="json", exclude_unset=True)
    return yaml.safe_dump({command: values}, sort_keys=False, allow_unicode=True)


def expand_lists(command: str, arguments: list[str]) -> list[str]:
    """Let a list flag take several values: `--weights 0.7 0.3` -> `--weights 0.7 --weights 0.3`.

    Values are taken up to the next flag; for numbers, up to the first word that is not a number.
    """
    lists: dict[str, FieldInfo] = {}
    for name, field in CONFIGS[command].model_fields.items():
        extra = typing.cast("dict[str, Any]", field.json_schema_extra)
        if _is_list(field) and not extra["positional"]:
            lists |= {f: field for f in (flag_of(name), extra["short"]) if f}
    expanded: list[str] = []
    current: str | None = None
    fresh = False
    for word in arguments:
        if current and not fresh and not word.startswith("-") and _belongs(word, lists[current]):
            expanded += [current, word]
            continue
        if fresh:
            fresh = False  # the flag's first value, whatever it looks like
        else:
            current = word if word in lists else None
            fresh = current is not None
        expanded.append(word)
    return expanded


def _belongs(word: str, field: FieldInfo) -> bool:
    item = get_args(field.annotation)[0]
    if item is not float:
        return True
    try:
        float(word)
    except ValueError:
        return False
    return True
