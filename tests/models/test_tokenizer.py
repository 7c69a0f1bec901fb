from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from longlora_cli.errors import DataError, NotFoundError
from longlora_cli.models.tokenizer import (
    GENERIC_CLASSES,
    GENERIC_MODEL_TYPES,
    load_tokenizer,
    takes_tokenizer_json_as_it_is,
    template_sha256,
    tokenizer_sha256,
)


@pytest.fixture
def folder(tiny_tokenizer_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_tokenizer_folder, tmp_path / "model"))


def test_a_folder_gives_a_fast_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.is_fast
    assert tokenizer.decode(tokenizer("The river ran")["input_ids"]) == "The river ran"


def test_hashes_do_not_depend_on_the_folder(folder: Path, tiny_tokenizer_folder: Path) -> None:
    here, there = load_tokenizer(folder), load_tokenizer(tiny_tokenizer_folder)
    assert tokenizer_sha256(here) == tokenizer_sha256(there)
    assert template_sha256(here) == template_sha256(there)


def test_hashes_survive_use_and_saving(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    before = tokenizer_sha256(tokenizer)
    tokenizer("text", truncation=True, max_length=4, padding="max_length")  # sets both in the backend
    assert tokenizer_sha256(tokenizer) == before
    tokenizer.save_pretrained(tmp_path / "again")
    assert tokenizer_sha256(load_tokenizer(tmp_path / "again")) == before


def test_the_template_has_a_hash_of_its_own(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    vocabulary, template = tokenizer_sha256(tokenizer), template_sha256(tokenizer)
    tokenizer.chat_template += " "
    assert tokenizer_sha256(tokenizer) == vocabulary
    assert template_sha256(tokenizer) != template


@pytest.mark.parametrize("change", ["vocabulary", "special", "eos"])
def test_what_changes_ids_changes_the_tokenizers_hash(folder: Path, change: str) -> None:
    before = tokenizer_sha256(load_tokenizer(folder))
    tokenizer = load_tokenizer(folder)
    if change == "vocabulary":
        tokenizer.add_tokens(["falcon"])
    elif change == "special":
        tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    else:
        tokenizer.eos_token = "<|endoftext|>"
    assert tokenizer_sha256(tokenizer) != before


@pytest.mark.parametrize("name", ["no/such-model", "/no/such/folder", "no-such-model"])
def test_an_unknown_name_is_not_found(name: str) -> None:
    with pytest.raises(NotFoundError, match=f"no folder {name}"):
        load_tokenizer(name)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", '{"version": "1.0"}', ""])
def test_a_damaged_tokenizer_is_told_in_one_line(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match="its tokenizer cannot be read") as caught:
        load_tokenizer(folder)
    assert "\n" not in caught.value.message


def test_code_beside_a_tokenizer_is_not_run(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}))
    with contextlib.suppress(DataError):
        load_tokenizer(folder)
    assert not marker.exists()


def of_type(folder: Path, tokenizer_class: str, model_type: str) -> Path:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": tokenizer_class}))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type} if model_type else {}))
    return folder


@pytest.mark.parametrize("model_type", GENERIC_MODEL_TYPES)
@pytest.mark.parametrize("tokenizer_class", GENERIC_CLASSES)
def test_without_torch_a_folder_gives_the_tokenizer_that_auto_tokenizer_gives(
    folder: Path, tokenizer_class: str, model_type: str
) -> None:
    of_type(folder, tokenizer_class, model_type)
    assert takes_tokenizer_json_as_it_is(folder)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    states = [{k: repr(v) for k, v in vars(each).items() if k != "_tokenizer"} for each in (ours, theirs)]
    assert states[0] == states[1]


def test_what_auto_tokenizer_would_not_read_as_it_is_is_left_to_it(folder: Path) -> None:
    of_type(folder, "TokenizersBackend", "qwen2")  # its tokenizers are known to name the wrong class
    assert not takes_tokenizer_json_as_it_is(folder)
    assert type(load_tokenizer(folder)) is type(AutoTokenizer.from_pretrained(str(folder)))
    assert not takes_tokenizer_json_as_it_is(of_type(folder, "Qwen2Tokenizer", "llama"))
    of_type(folder, "TokenizersBackend", "llama")
    assert takes_tokenizer_json_as_it_is(folder)
    (folder / "config.json").write_text("[")
    assert not takes_tokenizer_json_as_it_is(folder)
