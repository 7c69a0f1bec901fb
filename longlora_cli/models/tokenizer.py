"""Tokenizers by the same names as models."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_tokenizer(name: str | Path) -> Any:
    """Load it from a folder."""
    from transformers import AutoTokenizer

    from longlora_cli.models.source import base_folder

    return AutoTokenizer.from_pretrained(base_folder(str(name)) if not Path(name).is_dir() else name)
