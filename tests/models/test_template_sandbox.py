from __future__ import annotations

import time
from typing import Any

import jinja2
import pytest

from longlora_cli.models.template_sandbox import FAILURES, TemplateLimitError, apply_template, render_template
from longlora_cli.models.tokenizer import load_tokenizer

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": " Hi \n"},
    {"role": "assistant", "content": "<think>hm</think>Hello.", "tool_calls": []},
]
# One construct of real templates each.
CONSTRUCTS = {
    "loops": "{% for m in messages if m.role != 'system' %}{{ loop.index0 }}/{{ loop.length }}{{ loop.last }}"
    "{{ loop.previtem.role if loop.previtem }}{% else %}none{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}"
    "{% endfor %}",
    "namespace": "{% set ns = namespace(n=0, s='') %}{% for m in messages %}{% set ns.n = ns.n + loop.index %}"
    "{% set ns.s = ns.s ~ m['role'] %}{% endfor %}{{ ns.n }}{{ ns.s }}",
    "macros": "{% macro turn(role, text='-') %}[{{ role }}:{{ text }}]{% endmacro %}"
    "{% for m in messages %}{{ turn(m.role, m.content) }}{{ turn('x') }}{% endfor %}",
    "methods": "{{ messages[2].content.split('</think>')[-1].lstrip('H').replace('l', 'L').upper() }}",
    "filters": "{{ messages | map(attribute='role') | join(', ') }}{{ messages[0].content | trim | length }}"
    "{{ 'a%sb' | format(3) }}{{ [3, 1] | sort | first }}{{ x | default('none') }}",
    "json": "{{ messages | tojson }}{{ {'a': [1, (2, 3)], 'b<': none} | tojson(indent=2) }}",
    "slices": "{{ messages[1:][::-1][0]['role'] }}{{ messages[-1].content[:4] }}{% set a, b = 1, 2 %}{{ a + b * 3 }}",
    "items": "{% for key, value in messages[1].items() %}{{ key }}={{ value }};{% endfor %}"
    "{{ 7 % 4 }}{{ '%s!' % 'a' }}",
    "whitespace": "  {% if true %}\n  a\n  {%- endif %}\n{# gone #}\nb\n",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "special tokens": "{{ eos_token }}{{ bos_token is defined }}{{ add_generation_prompt }}{{ tools is none }}",
}


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_a_template_gives_the_text_of_transformers(name: str) -> None:
    tokenizer = load_tokenizer("builtin")
    tokenizer.chat_template = CONSTRUCTS[name]
    for prompt in (False, True):
        expected = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
        assert apply_template(tokenizer, CHAT, add_generation_prompt=prompt) == expected


DOUBLED = "{% set s = s + s %}" * 60
ENDLESS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "macros that call themselves twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a string times a number": "{{ 'a' * 10 ** 12 }}",
    "a number times a list": "{{ 10 ** 12 * [1] }}",
    "doubled by +": "{% set s = 'abc' %}" + DOUBLED + "{{ s }}",
    "doubled by ~": "{% set s = 'abc' %}" + DOUBLED.replace("+", "~") + "{{ s }}",
    "doubled by join": "{% set s = 'abc' %}" + "{% set s = [s, s] | join %}" * 60 + "{{ s }}",
    "doubled lists": "{% set s = [1] %}" + "{% set s = [s, s] %}" * 60 + "{{ s }}",
    "doubled mappings": "{% set s = 'a' %}" + "{% set s = {'a': s, 'b': s} %}" * 60 + "{{ s | tojson }}",
    "doubled by dict()": "{% set s = 'a' %}" + "{% set s = dict(a=s, b=s) %}" * 60 + "{{ s }}",
    "replace": "{% set s = 'a' * 1000000 %}{{ s.replace('a', s) }}",
    "the filter replace": "{% set s = 'a' * 1000000 %}{{ s | replace('a', s) }}",
    "join by a long text": "{% set s = 'a' * 1000000 %}{{ s.join(['b'] * 1000000) }}",
    "center": "{{ 'a' | center(10 ** 12) }}",
    "ljust": "{{ 'a'.ljust(10 ** 12) }}",
    "format": "{{ '{:1000000000000}'.format(1) }}",
    "the operator %": "{{ '%1000000000000d' % 1 }}",
    "the operator % with a star": "{{ '%*d' % (10 ** 12, 1) }}",
    "large powers": "{{ 2 ** (10 ** 9) }}",
    "powers of powers": "{% set n = 9 ** 64 %}{% set n = n ** 64 %}{% set n = n ** 64 %}{% set n = n ** 64 %}{{ n }}",
    "much output": "{% for a in range(99999) %}{{ 'a' * 100000 }}{% endfor %}",
    "translate": "{{ 'aaa'.translate({97: 'b' * 1000000}) }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_would_not_end_or_grows_without_end_is_stopped(name: str) -> None:
    started = time.process_time()
    with pytest.raises(TemplateLimitError):
        render_template(ENDLESS[name], messages=CHAT)
    assert time.process_time() - started < 20


@pytest.mark.parametrize(
    "escape",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{% for m in messages %}{{ m.update({'role': 'x'}) }}{% endfor %}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_nothing_outside_of_the_chat_can_be_reached_or_changed(escape: str) -> None:
    with pytest.raises(FAILURES):
        render_template(escape + "{{ x.y }}", messages=CHAT)


def test_limits_grow_with_the_chat() -> None:
    long = [{"role": "user", "content": "word " * 4_000_000}]
    text = "{% for m in messages %}{{ m.content + m.content }}{{ (m.content ~ '.') | trim }}{% endfor %}"
    assert len(render_template(text, messages=long)) == 3 * 20_000_000 + 1
    loops = "{% for m in messages %}{% for n in messages %}{% endfor %}{{ m.content }}{% endfor %}"
    assert len(render_template(loops, messages=[{"role": "user", "content": "a"}] * 2000)) == 2000


def test_a_template_of_a_megabyte_is_refused() -> None:
    with pytest.raises(TemplateLimitError, match="at most"):
        render_template("a" * ((1 << 20) + 1), messages=CHAT)


def test_the_refusal_of_a_template_is_its_own_words() -> None:
    with pytest.raises(jinja2.TemplateError, match="only users"):
        render_template("{{ raise_exception('only users') }}", messages=CHAT)
