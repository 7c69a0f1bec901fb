"""Names of models as parts of paths."""

from __future__ import annotations

import re
from pathlib import Path

# What lm-evaluation-harness replaces by two underscores, and the backslash: `utils.sanitize_model_name`.
_UNSAFE = re.compile(r"[\"<>:/|\\?*\[\]]+")


def folder_of(model: str) -> str:
    """The whole name as one folder's, by lm-evaluation-harness's rule (`org/name` -> `org__name`)."""
    return _UNSAFE.sub("__", model) if model.strip("./") else "model"


def short_folder_of(model: str) -> str:
    """Its last part, as LongBench names models; `model` where there is none."""
    return folder_of(Path(model).name)
