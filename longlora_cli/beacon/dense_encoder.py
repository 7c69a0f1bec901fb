"""Texts as unit vectors, by an encoder in a local folder.

The folder is a transformers encoder with its tokenizer, as `save_pretrained` or sentence-transformers writes one. Of
sentence-transformers' files those are read that change the vectors: `modules.json`, the pooling's `config.json`,
`sentence_bert_config.json` (longest input) and the prompts in `config_sentence_transformers.json`. No code of the
folder is run and nothing is fetched.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longlora_cli.errors import DataError
from longlora_cli.models.source import base_folder
from longlora_cli.models.tokenizer import load_tokenizer

CLS, MEAN = "cls", "mean"
_MODULES = ("Transformer", "Pooling", "Normalize")  # a vector's length does not change its cosine
_TEXTS_AT_ONCE = 32
# Names under which folders keep the words that stand before a query and before what is searched.
_QUERY_PROMPTS, _TEXT_PROMPTS = ("query",), ("document", "passage", "corpus")


class DenseEncoder:
    """An encoder read from a folder.

    Args:
        folder: Holds `config.json`, safetensors weights and a tokenizer, or a sentence-transformers model. Pooling is
            what the folder says; the first token's state (CLS) where it says nothing.
        device: Where it computes, in float32.

    Raises:
        DataError: The folder cannot be read, or makes its vectors in another way than CLS or mean pooling.
        NotFoundError, SecurityError: From `base_folder`.
    """

    def __init__(self, folder: Path, device: str | torch.device = "cpu") -> None:
        from transformers import AutoModel

        encoder, pooling = _parts(folder)
        base_folder(str(encoder))  # refuses config keys that could run code
        self.pooling = _pooling(pooling)
        self._tokenizer = load_tokenizer(encoder)
        try:
            model = AutoModel.from_pretrained(
                encoder,
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"{encoder} is not an encoder that transformers can load: {reason}") from error
        self._model: Any = model.to(device).eval().requires_grad_(False)
        self.longest_tokens = self._longest(encoder)
        prompts = _read_json(folder / "config_sentence_transformers.json").get("prompts") or {}
        self._query_prompt = next((prompts[name] for name in _QUERY_PROMPTS if name in prompts), "")
        self._text_prompt = next((prompts[name] for name in _TEXT_PROMPTS if name in prompts), "")

    def encode(self, texts: Sequence[str], *, query: bool) -> NDArray[np.float64]:
        """Unit vectors `[texts, width]` in float64.

        A text longer than the encoder reads is read in pieces, and its vector is the mean of theirs, each weighted by
        its tokens: nothing is cut.

        Args:
            texts: At least one.
            query: Use the words that the folder puts before queries; else those before texts.
        """
        prompt = self._query_prompt if query else self._text_prompt
        pieces = self._tokenizer(
            [prompt + text for text in texts],
            truncation=True,
            max_length=self.longest_tokens,
            return_overflowing_tokens=True,
        )
        owners = pieces.pop("overflow_to_sample_mapping")
        vectors: list[Tensor] = []
        rows = [{name: values[row] for name, values in pieces.items()} for row in range(len(owners))]
        for start in range(0, len(rows), _TEXTS_AT_ONCE):
            vectors.append(self._pooled(rows[start : start + _TEXTS_AT_ONCE]))
        units = torch.nn.functional.normalize(torch.cat(vectors).double(), dim=-1)
        sums = torch.zeros(len(texts), units.shape[1], dtype=torch.float64)
        for owner, row, unit in zip(owners, rows, units, strict=True):
            sums[owner] += len(row["input_ids"]) * unit
        found: NDArray[np.float64] = torch.nn.functional.normalize(sums, dim=-1).numpy()
        return found

    @torch.no_grad()
    def _pooled(self, rows: list[dict[str, list[int]]]) -> Tensor:
        padded = self._tokenizer.pad(rows, padding_side="right", return_tensors="pt").to(self._model.device)
        states: Tensor = self._model(**padded).last_hidden_state
        if self.pooling == CLS:
            return states[:, 0].cpu()
        mask = padded["attention_mask"].unsqueeze(-1).to(states.dtype)
        return ((states * mask).sum(1) / mask.sum(1)).cpu()

    def _longest(self, encoder: Path) -> int:
        config = self._model.config
        limits = [
            _read_json(encoder / "sentence_bert_config.json").get("max_seq_length"),
            self._tokenizer.model_max_length,
            # RoBERTa's positions begin after the padding token's: of 514 there are 512.
            config.max_position_embeddings - (config.pad_token_id + 1 if _is_roberta(config) else 0)
            if getattr(config, "max_position_embeddings", None)
            else None,
        ]
        return min(int(limit) for limit in limits if limit)


def _is_roberta(config: Any) -> bool:
    return str(config.model_type) in ("roberta", "xlm-roberta", "camembert", "mpnet")


def _parts(folder: Path) -> tuple[Path, dict[str, Any]]:
    # The transformers folder, and the pooling's settings: {} where the folder says nothing.
    path = folder / "modules.json"
    if not path.is_file():
        return folder, _read_json(folder / "1_Pooling" / "config.json")
    encoder, pooling = folder, dict[str, Any]()
    try:
        modules = [
            (str(module["type"]).rsplit(".", 1)[-1], str(module["path"]))
            for module in json.loads(path.read_text(encoding="utf-8"))
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error!r}") from error
    for kind, name in modules:
        place = folder / name
        if not place.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"{path} names a module outside its folder: {name}")
        if kind not in _MODULES:
            raise DataError(
                f"{folder} makes its vectors with a module {kind}",
                rule="A dense encoder is a transformer with CLS or mean pooling.",
            )
        if kind == "Transformer":
            encoder = place
        elif kind == "Pooling":
            pooling = _read_json(place / "config.json")
    return encoder, pooling


def _pooling(config: dict[str, Any]) -> str:
    named = config.get("pooling_mode")
    switched = [
        name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
        for name, on in config.items()
        if name.startswith("pooling_mode_") and on
    ]
    modes = [str(named)] if named else switched or [CLS]
    if modes not in ([CLS], [MEAN]):
        raise DataError(
            f"the encoder pools by {' and '.join(modes)}",
            rule="A dense encoder is a transformer with CLS or mean pooling.",
        )
    return modes[0]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no JSON object")
    return content
