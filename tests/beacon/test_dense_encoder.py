"""A dense encoder from a folder: pooling, length, prompts, order, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longlora_cli.beacon.dense_encoder import DenseEncoder
from longlora_cli.beacon.retrieval import DenseIndex, RetrievalSettings, Retriever, Span
from longlora_cli.errors import DataError, NotFoundError, SecurityError
from longlora_cli.models.tokenizer import load_tokenizer

POOLING = "1_Pooling/config.json"
TEXTS = ["The river ran past the mill.", "falcon", "It was the best of times, it was the worst of times."]


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path) -> Path:
    """A random BERT of 2 layers and 32 positions beside the tiny tokenizer, with [CLS] and [SEP] of its own."""
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    model = BertModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # so that texts are far apart
    model.save_pretrained(folder)
    tokenizer = load_tokenizer(tiny_tokenizer_folder)
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>")
    fast.save_pretrained(folder)
    return folder


def _copy(folder: Path, to: Path, **files: Any) -> Path:
    shutil.copytree(folder, to)
    for name, content in files.items():
        path = to / name.replace("__", "/").replace("_json", ".json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return to


def _states(folder: Path, text: str) -> torch.Tensor:
    from transformers import AutoTokenizer, BertModel

    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return BertModel.from_pretrained(folder)(input_ids=ids).last_hidden_state[0].double()


def _unit(vector: torch.Tensor) -> np.ndarray:
    return (vector / vector.norm()).numpy()


def test_a_folder_that_says_nothing_is_pooled_by_its_first_token(encoder_folder: Path) -> None:
    encoder = DenseEncoder(encoder_folder)
    vectors = encoder.encode(TEXTS, query=False)
    assert encoder.pooling == "cls"
    for text, vector in zip(TEXTS, vectors, strict=True):
        np.testing.assert_allclose(vector, _unit(_states(encoder_folder, text)[0]), atol=1e-6)


@pytest.mark.parametrize(
    "pooling",
    [
        {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "include_prompt": True},
        {"pooling_mode": "mean", "word_embedding_dimension": 32},
    ],
)
def test_mean_pooling_is_the_mean_over_a_texts_own_tokens_without_padding(
    encoder_folder: Path, tmp_path: Path, pooling: dict[str, Any]
) -> None:
    folder = _copy(encoder_folder, tmp_path / "mean", **{"1_Pooling__config_json": pooling})
    vectors = DenseEncoder(folder).encode(TEXTS, query=False)  # three lengths, so that two are padded
    for text, vector in zip(TEXTS, vectors, strict=True):
        np.testing.assert_allclose(vector, _unit(_states(encoder_folder, text).mean(0)), atol=1e-6)


def test_the_folder_of_sentence_transformers_is_read_by_its_modules(
    encoder_folder: Path, tmp_path: Path
) -> None:
    modules = [
        {"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "mine", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    folder = tmp_path / "st"
    folder.mkdir()
    shutil.copytree(encoder_folder, folder / "0_Transformer")
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "mine").mkdir()
    (folder / "mine" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    mean = DenseEncoder(folder).encode(TEXTS[:1], query=False)[0]
    np.testing.assert_allclose(mean, _unit(_states(encoder_folder, TEXTS[0]).mean(0)), atol=1e-6)


def test_a_text_longer_than_the_encoder_reads_is_read_in_pieces_to_its_end(encoder_folder: Path) -> None:
    encoder = DenseEncoder(encoder_folder)
    assert encoder.longest_tokens == 32
    start = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 3
    vectors = encoder.encode([start + "falcon river", start + "mill miller"], query=False)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3  # the difference stands beyond 32 tokens
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0)


def test_the_vector_of_a_long_text_is_the_mean_of_its_pieces_weighted_by_their_tokens(
    encoder_folder: Path,
) -> None:
    from transformers import AutoTokenizer, BertModel

    text = TEXTS[2] * 4
    encoder, tokenizer = DenseEncoder(encoder_folder), AutoTokenizer.from_pretrained(encoder_folder)
    first, *inner, last = tokenizer(text)["input_ids"]
    assert len(inner) > 30
    model, total = BertModel.from_pretrained(encoder_folder), torch.zeros(32, dtype=torch.float64)
    for start in range(0, len(inner), 30):
        piece = [first, *inner[start : start + 30], last]
        with torch.no_grad():
            state = model(input_ids=torch.tensor([piece])).last_hidden_state[0, 0].double()
        total += len(piece) * state / state.norm()
    np.testing.assert_allclose(encoder.encode([text], query=False)[0], _unit(total), atol=1e-6)


def test_max_seq_length_of_the_folder_is_kept(encoder_folder: Path, tmp_path: Path) -> None:
    folder = _copy(encoder_folder, tmp_path / "short", sentence_bert_config_json={"max_seq_length": 12})
    assert DenseEncoder(folder).longest_tokens == 12


def test_prompts_of_the_folder_stand_before_queries_and_before_texts(
    encoder_folder: Path, tmp_path: Path
) -> None:
    prompts = {"prompts": {"query": "user: ", "document": "code: "}}
    encoder = DenseEncoder(
        _copy(encoder_folder, tmp_path / "prompted", config_sentence_transformers_json=prompts)
    )
    query, text = (encoder.encode(["river"], query=query)[0] for query in (True, False))
    np.testing.assert_allclose(query, _unit(_states(encoder_folder, "user: river")[0]), atol=1e-6)
    np.testing.assert_allclose(text, _unit(_states(encoder_folder, "code: river")[0]), atol=1e-6)


def test_a_dense_index_ranks_by_cosine(encoder_folder: Path) -> None:
    index = DenseIndex(DenseEncoder(encoder_folder))
    index.update(TEXTS)
    query = _unit(_states(encoder_folder, "the miller slept")[0])
    cosines = [float(query @ _unit(_states(encoder_folder, text)[0])) for text in TEXTS]
    np.testing.assert_allclose(index.scores("the miller slept") - 1, cosines, atol=1e-6)


def test_texts_that_stayed_are_not_encoded_again(
    encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = DenseEncoder(encoder_folder)
    index = DenseIndex(encoder)
    index.update(TEXTS[:2])
    seen: list[str] = []
    plain = encoder.encode

    def noting(texts: Any, *, query: bool) -> Any:
        seen.extend(texts)
        return plain(texts, query=query)

    monkeypatch.setattr(encoder, "encode", noting)
    index.update(TEXTS)
    assert seen == TEXTS[2:]
    whole = DenseIndex(encoder)
    whole.update(TEXTS)
    np.testing.assert_allclose(index.scores("mill"), whole.scores("mill"), atol=1e-6)


def test_the_method_may_be_a_folder_and_finds_what_lies_nearest(
    encoder_folder: Path, tiny_tokenizer_folder: Path
) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer_folder)
    past = [token for text in TEXTS for token in tokenizer(text)["input_ids"]]
    settings = RetrievalSettings(str(encoder_folder), topk=1, key_length=8)
    asked = tokenizer.decode(past[8:16])
    assert Retriever(tokenizer, settings).find(past, asked) == [Span(8, 16)]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"1_Pooling__config_json": {"pooling_mode_max_tokens": True}}, "pools by max"),
        ({"1_Pooling__config_json": {"pooling_mode": "lasttoken"}}, "pools by lasttoken"),
        (
            {"1_Pooling__config_json": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}},
            "pools by cls and mean",
        ),
        ({"modules_json": [{"type": "a.Dense", "path": "2_Dense"}]}, "a module Dense"),
        ({"modules_json": [{"type": "a.Transformer", "path": "../.."}]}, "outside its folder"),
        ({"modules_json": [{}]}, "damaged"),
        ({"config_json": {"model_type": "unheard-of"}}, "not an encoder"),
        ({"1_Pooling__config_json": [1]}, "no JSON object"),
    ],
)
def test_what_is_no_cls_or_mean_encoder_is_refused(
    encoder_folder: Path, tmp_path: Path, files: dict[str, Any], words: str
) -> None:
    folder = _copy(encoder_folder, tmp_path / "other", **files)
    with pytest.raises(DataError, match=words) as caught:
        DenseEncoder(folder)
    assert "\n" not in caught.value.message


def test_a_folder_whose_config_could_run_code_is_refused(encoder_folder: Path, tmp_path: Path) -> None:
    config = {**json.loads((encoder_folder / "config.json").read_text()), "trust_remote_code": True}
    with pytest.raises(SecurityError):
        DenseEncoder(_copy(encoder_folder, tmp_path / "code", config_json=config))


def test_weights_in_a_pickle_file_are_not_read(encoder_folder: Path, tmp_path: Path) -> None:
    folder = _copy(encoder_folder, tmp_path / "pickled")
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match="not an encoder"):
        DenseEncoder(folder)


def test_a_folder_without_a_config_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        DenseEncoder(tmp_path)
