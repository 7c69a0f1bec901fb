from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
from template_tokenizers import NAMES, bare_tokenizer, byte_level, templated

from longlora_cli.errors import DataError, LongLoRAError, NotFoundError, SettingsError
from longlora_cli.models.template_choice import TEMPLATES, choose_template
from longlora_cli.models.tokenizer import load_tokenizer, template_sha256

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def test_auto_leaves_the_tokenizers_own_template() -> None:
    tokenizer = load_tokenizer("builtin")
    before = tokenizer.chat_template
    choose_template(tokenizer, "auto")
    assert tokenizer.chat_template == before


def test_every_named_template_is_shipped_with_its_source() -> None:
    for name, file in TEMPLATES.items():
        text = (resources.files("longlora_cli.models") / "templates" / f"{file}.jinja").read_text("utf-8")
        comment = text.partition("-#}")[0]
        assert text.startswith("{#-"), name
        assert name == "none" or "Source:" in comment, name
        assert name == "none" or "https://" in comment, name


def test_qwen_is_another_name_of_chatml() -> None:
    assert template_sha256(load_tokenizer("builtin", "qwen")) == template_sha256(
        load_tokenizer("builtin", "chatml")
    )


# What ends an answer and opens a turn: other families' tokenizers have it as plain text only.
FOREIGN = [
    ("llama-3", "chatml", "<|start_header_id|>, <|end_header_id|>, <|eot_id|>"),
    ("chatml", "llama-3", "<|im_start|>, <|im_end|>"),
    ("gemma", "phi", "<start_of_turn>, <end_of_turn>"),
    ("phi", "llama-2", "<|user|>, <|end|>, <|assistant|>"),
]


@pytest.mark.parametrize(("template", "family", "missing"), FOREIGN)
def test_a_template_whose_control_tokens_the_tokenizer_lacks_is_refused(
    template: str, family: str, missing: str
) -> None:
    tokenizer = bare_tokenizer(family)
    before = tokenizer.chat_template
    with pytest.raises(SettingsError) as caught:
        choose_template(tokenizer, template)
    assert missing in caught.value.message
    assert tokenizer.chat_template == before


@pytest.mark.parametrize("family", [name for name in NAMES if name != "qwen"])
def test_the_hint_names_the_templates_that_fit(family: str) -> None:
    tokenizer = bare_tokenizer(family)
    foreign = "gemma" if family != "gemma" else "phi"
    with pytest.raises(SettingsError) as caught:
        choose_template(tokenizer, foreign)
    assert caught.value.hint is not None
    assert family in caught.value.hint
    assert foreign not in caught.value.hint


def test_a_control_token_that_is_an_ordinary_token_is_not_enough() -> None:
    tokenizer = byte_level(["<|endoftext|>"], bos=None, eos="<|endoftext|>")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])  # as text from users would give them
    with pytest.raises(SettingsError, match="has not as control tokens"):
        choose_template(tokenizer, "chatml")


@pytest.mark.parametrize(("template", "token"), [("llama-2", "bos_token"), ("mistral", "bos_token")])
def test_a_template_that_needs_a_token_says_which(template: str, token: str) -> None:
    with pytest.raises(SettingsError, match=f"needs a tokenizer with {token}"):
        choose_template(bare_tokenizer("chatml"), template)


def test_none_begins_with_bos_where_the_tokenizer_does() -> None:
    assert templated("none").apply_chat_template(CHAT, tokenize=False) == "<s>Hi\n\nHello.</s>"
    without = load_tokenizer("builtin", "none")
    text = without.apply_chat_template(CHAT, tokenize=False)
    assert text == f"Hi\n\nHello.{without.eos_token}"


def test_a_file_is_a_template(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}<|user|>{{ m['content'] }}{{ eos_token }}{% endfor %}")
    tokenizer = load_tokenizer("builtin", str(path))  # <|user|> is meant as plain text
    assert tokenizer.apply_chat_template(CHAT, tokenize=False).startswith("<|user|>Hi")


FAULTS = {
    "{% for m in messages %}\n{{ m.content }\n{% endfor %}": r"mine\.jinja:2: not a Jinja template",
    "": r"mine\.jinja: the chat template is empty",
    "{{ messages | length }}": "leaves out what the assistant says",
    "{{ raise_exception('not today') }}": r"fails on a question with an answer: not today",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "more steps than",
    "{{ messages[7].content }}": "fails on a question with an answer",
    "{% for m in messages %}{{ m.content }}<|im_stop|>{% endfor %}": r"ends an answer with <\|im_stop\|>",
    "{% for m in messages %}{{ m.content }}{% endfor %}": "ends an answer with nothing",
}


@pytest.mark.parametrize("text", FAULTS)
def test_a_faulty_file_is_refused_with_its_reason(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(text)
    with pytest.raises(LongLoRAError, match=FAULTS[text]) as caught:
        load_tokenizer("builtin", str(path))
    assert caught.value.exit_code == 2


def test_a_file_that_is_no_text_is_refused_by_its_byte(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_bytes(b"{{ messages \xff")
    with pytest.raises(DataError, match="byte 12 is not UTF-8"):
        load_tokenizer("builtin", str(path))
    path.write_bytes(b"a" * (1 << 19))
    with pytest.raises(DataError, match="524,288 bytes are no chat template"):
        load_tokenizer("builtin", str(path))


def test_a_misspelt_name_is_told_the_right_one() -> None:
    with pytest.raises(SettingsError, match="did you mean llama-3"):
        load_tokenizer("builtin", "llama3")
    with pytest.raises(NotFoundError, match="there is no such file"):
        load_tokenizer("builtin", "my/template.jinja")
