"""Load a tokenizer, and name it by what decides its ids.

Hashes cover what changes token ids (vocabulary, merges, normalizer, pre-tokenizer, special tokens) and the
chat template, each apart, so that prepared data can say which of the two differs from a model's.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longlora_cli.errors import DataError, NotFoundError
from longlora_cli.models.template_choice import OWN, choose_template

BUILTIN = Path(__file__).parent / "builtin"
# The parts of tokenizer.json that change ids; padding and truncation are the caller's business.
_IDENTITY = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "model")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
GENERIC_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Names by which a folder says that its tokenizer.json holds all; saved runs and models do."""

GENERIC_MODEL_TYPES = ("", "gemma2", "gemma3_text", "llama", "olmo2", "qwen3", "qwen3_moe", "smollm3")
"""Model types ("" without a config.json) of which transformers believes those names; of others it knows better."""


def load_tokenizer(name_or_folder: str | Path, chat_template: str = OWN) -> Any:
    """Load a fast tokenizer without running foreign code.

    Args:
        name_or_folder: A folder (model, run or adapter, each with its own tokenizer files), `builtin` for the
            model shipped in this package, or a hub name.
        chat_template: The template that it renders with; see `choose_template`.

    Returns:
        A `PreTrainedTokenizerFast`.

    Raises:
        NotFoundError: No such folder, or the hub cannot be reached and its files are not in the local cache.
        DataError: The folder holds no tokenizer, a damaged one, or one without a `tokenizers` backend.
        SettingsError, NotFoundError, DataError: From `choose_template`.
    """
    is_builtin = str(name_or_folder) == "builtin"
    folder = BUILTIN if is_builtin else Path(name_or_folder)
    if (folder / "adapter" / "tokenizer.json").is_file():
        folder = folder / "adapter"  # a run keeps its tokenizer with its adapter
    is_folder = is_builtin or folder.is_dir()
    if is_folder and not any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json")):
        raise DataError(
            f"{folder} holds no tokenizer",
            rule="A model folder has tokenizer.json and tokenizer_config.json.",
        )
    try:
        with collector_paused():
            tokenizer = _loader(folder, is_folder=is_folder).from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=is_folder
            )
    except Exception as error:  # the backend raises nothing narrower for a damaged file
        reason = _first_line(error)
        if not is_folder and isinstance(error, OSError | ValueError):
            raise NotFoundError(
                f"there is no folder {folder}, and the hub gives no tokenizer of that name: {reason}",
                hint="Give a model folder, a hub name while online, or 'builtin'.",
            ) from error
        raise DataError(f"{folder}: its tokenizer cannot be read: {reason}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{name_or_folder} has no fast tokenizer",
            rule="Labels come from token offsets, which only tokenizer.json backends give.",
        )
    choose_template(tokenizer, chat_template)
    return tokenizer


@contextmanager
def collector_paused() -> Iterator[None]:
    """Without Python's collector, which would walk through all modules again and again while a vocabulary's lists are
    made: 0.2 s instead of 0.5 s for 49,152 tokens beside torch.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _loader(folder: Path, *, is_folder: bool) -> Any:
    if is_folder and takes_tokenizer_json_as_it_is(folder):
        from transformers.tokenization_utils_tokenizers import TokenizersBackend

        return TokenizersBackend
    from transformers import AutoTokenizer

    return AutoTokenizer


def takes_tokenizer_json_as_it_is(folder: Path) -> bool:
    """Whether AutoTokenizer would give the folder's tokenizer the class TokenizersBackend, as far as that is known.

    AutoTokenizer reads the model's configuration first, and importing that imports torch: 3 s of CPU time of a command
    that needs no torch. False where the answer is not known; then AutoTokenizer is asked.
    """
    try:
        settings, config = (
            json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            for path in (folder / "tokenizer_config.json", folder / "config.json")
        )
        return (
            (folder / "tokenizer.json").is_file()
            and settings.get("tokenizer_class") in GENERIC_CLASSES
            and "auto_map" not in settings
            and config.get("model_type", "") in GENERIC_MODEL_TYPES
        )
    except (OSError, ValueError, AttributeError):
        return False


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hex SHA-256 of what decides ids: vocabulary, merges, normalizer, pre-tokenizer, special tokens."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    identity: dict[str, Any] = {part: backend.get(part) for part in _IDENTITY}
    identity["special"] = {name: getattr(tokenizer, name, None) for name in _SPECIAL}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def template_sha256(tokenizer: Any) -> str:
    """Hex SHA-256 of the chat template's text; of the empty text when there is none."""
    template = tokenizer.chat_template or ""
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def was_trained_otherwise(adapter: Path | None, tokenizer: Any) -> bool:
    """Whether the adapter folder holds another chat template than the tokenizer was given."""
    path = adapter / "chat_template.jinja" if adapter is not None else None
    return path is not None and path.is_file() and path.read_text(encoding="utf-8") != tokenizer.chat_template


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
