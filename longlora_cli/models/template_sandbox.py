"""Chat templates run in a sandbox with limits: they come from model folders, and are programs.

Jinja's immutable sandbox keeps a template from Python's internals and from changing what it is given; it does not keep
it from running or growing without end. Here each pass of a loop and each call is a step of a budget, and no string or
list grows beyond a size; both follow from the chat's own length. What a template can use is what transformers gives it,
so that texts are those of `apply_chat_template` (documented in its "chat templating" guide).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

LARGEST_TEMPLATE = 1 << 20
# Ten million passes of a loop take 1 s, as many calls 37 s, so a call is ten steps. A chat of 1,000 messages takes some
# 10,000 calls.
_STEPS, _CHARACTERS = 10_000_000, 1 << 24
_CALL_STEPS, _STEPS_PER_CHARACTER, _GROWTH = 10, 4, 16
# Widths and counts (`center`, `indent`, `'%9d'`) beyond this serve no chat.
_LARGEST_NUMBER = 1 << 20
_LONG_NUMBER = re.compile(r"\d{7}")


class TemplateLimitError(jinja2.TemplateRuntimeError):
    """A template took more steps, or made more text, than its chat can need."""


@dataclass
class _Budget:
    """What is left of one rendering.

    Args:
        steps: Passes of loops, and calls, which count more.
        characters: Most characters (or items) of one value.
        sizes: Size of each list that was made, by id; the list is held so that its id is not used again.
    """

    steps: int
    characters: int
    sizes: dict[int, tuple[int, Any]] = field(default_factory=dict)


_budget: ContextVar[_Budget] = ContextVar("budget")


def render_template(template: str, *, messages: list[dict[str, Any]], **variables: Any) -> str:
    """Render a chat template.

    Args:
        template: Its text.
        messages: The chat.
        variables: What else it can read: `tools`, `add_generation_prompt`, the tokenizer's special tokens.

    Raises:
        jinja2.TemplateError: Not a template, it refuses the chat, or (`TemplateLimitError`) takes too much.
    """
    if len(template) > LARGEST_TEMPLATE:
        raise TemplateLimitError(
            f"a chat template of {len(template):,} characters; at most {LARGEST_TEMPLATE:,}"
        )
    size = _characters_in(messages) + _characters_in(variables)
    token = _budget.set(_Budget(_STEPS + _STEPS_PER_CHARACTER * size, _CHARACTERS + _GROWTH * size))
    try:
        pieces, total = [], 0
        for piece in _compiled(template).generate(messages=messages, **variables):
            total += len(piece)
            _check_size(total)
            pieces.append(piece)
        return "".join(pieces)
    except RecursionError as error:
        raise TemplateLimitError("the chat template calls itself without end") from error
    finally:
        _budget.reset(token)


FAILURES = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What a faulty template or an unforeseen chat raises while it is rendered."""


def apply_template(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool = False,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """The text that `tokenizer.apply_chat_template` gives, made within limits.

    Raises:
        FAILURES: The template refuses the chat, is faulty, or takes too much.
    """
    return render_template(
        tokenizer.get_chat_template(tools=tools),
        messages=messages,
        tools=tools,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **tokenizer.special_tokens_map,
    )


def _characters_in(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(key) + _characters_in(item) for key, item in value.items())
    return sum(map(_characters_in, value)) if isinstance(value, list) else 1


def _spend(steps: int) -> None:
    budget = _budget.get()
    budget.steps -= steps
    if budget.steps < 0:
        raise TemplateLimitError("the chat template takes more steps than its chat can need")


def _check_size(size: int) -> None:
    if size > _budget.get().characters:
        raise TemplateLimitError("the chat template makes more text than its chat can need")


def _size(value: Any) -> int:
    """Characters and items of a value; a list within a list counts as often as it stands there."""
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, list | tuple | dict):
        return 1
    budget = _budget.get()
    if id(value) not in budget.sizes:
        items = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        budget.sizes[id(value)] = (1 + sum(map(_size, items)), value)
    return budget.sizes[id(value)][0]


def _checked(value: Any) -> Any:
    _check_size(_size(value))
    return value


def _check_growth(name: str, value: Any, arguments: Sequence[Any]) -> None:
    """Refuse a method or filter of a string before it makes something huge."""
    numbers = [number for number in arguments if isinstance(number, int)]
    if name == "translate" or any(abs(number) > _LARGEST_NUMBER for number in numbers):
        raise TemplateLimitError(f"the chat template uses {name} in a way that no chat needs")
    if name == "replace" and len(arguments) > 1:
        _check_size(len(str(value)) + str(value).count(str(arguments[0])) * len(str(arguments[1])))
    if name == "join":
        joined, separator = (
            (arguments[0], value) if isinstance(value, str) and arguments else (value, arguments)
        )
        items = joined if isinstance(joined, list | tuple) else []
        _check_size(_size(items) + len(items) * _size(separator or ""))
    if name in ("format", "format_map") and _LONG_NUMBER.search(str(value)):
        raise TemplateLimitError("the chat template pads text to a width that no chat needs")


def _guarded(name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose arguments and result are checked."""
    skipped = 1 if hasattr(filter_, "jinja_pass_arg") else 0

    @functools.wraps(filter_)
    def guarded(*arguments: Any, **named: Any) -> Any:
        _spend(_CALL_STEPS)
        value, *rest = arguments[skipped:] or ("",)
        _check_growth(name, value, [*rest, *named.values()])
        return _checked(filter_(*arguments, **named))

    return guarded


class _Counted(NodeTransformer):
    """Passes of loops, joined texts and new lists go through the environment, where they are counted."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _through("passes", node, [node.iter])
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _through("joined", node, node.nodes)

    def _made(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _through("made", node, [node])

    visit_List = visit_Dict = visit_Tuple = _made


def _through(method: str, node: nodes.Node, arguments: list[Any]) -> Any:
    call: Any = nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)
    return call.set_lineno(node.lineno).set_environment(node.environment)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for transformers; here it is passed over."""

    tags = {"generation"}  # noqa: RUF012 (as the base class declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements between the two tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Names(Namespace):
    """A namespace that does not print what is in it, so that nested ones cannot grow."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with what transformers gives to templates, and the budget."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        # Without the optimizer, which would compute constants ('a' * 10 ** 9) outside of any budget.
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], optimized=False
        )
        self.filters["tojson"] = _to_json
        self.filters = {name: _guarded(name, function) for name, function in self.filters.items()}
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise, "strftime_now": _now, "namespace": _Names}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Counted().visit(super()._parse(source, name, filename))
        return tree

    @staticmethod
    def passes(items: Any) -> Iterator[Any]:
        """The items of a loop, each a step."""
        for item in items:
            _spend(1)
            yield item

    @staticmethod
    def joined(*values: Any) -> str:
        """`a ~ b`."""
        texts = [str(_checked(value)) for value in values]
        _check_size(sum(map(len, texts)))
        return "".join(texts)

    @staticmethod
    def made(value: Any) -> Any:
        """A new list, tuple or mapping."""
        return _checked(value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic; texts and lists may not grow, nor numbers."""
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(times, int):
                    _check_size(_size(value) * times)
        if operator == "**" and (abs(left) > _LARGEST_NUMBER or abs(right) > 64):
            raise TemplateLimitError("the chat template computes a number that no chat needs")
        if operator == "%" and isinstance(left, str):
            _check_growth("format", left, right if isinstance(right, tuple) else [right])
        return _checked(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, *arguments: Any, **named: Any) -> Any:  # type: ignore[override]
        """A call; each is a step."""
        _spend(_CALL_STEPS)
        # The sandbox wraps `str.format`.
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if isinstance(owner, str):
            _check_growth(getattr(function, "__name__", ""), owner, [*arguments, *named.values()])
        return _checked(super().call(context, function, *arguments, **named))


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter writes `<` and `&` as HTML needs them."""
    _checked(value)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.cache
def _sandbox() -> _Sandbox:
    return _Sandbox()


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    return _sandbox().from_string(template)
