"""What stands beside the tensors: config with both spellings of the positions, tokenizer, record and model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from longlora_cli.data.chat_template import end_token_id
from longlora_cli.errors import IncompatibleError, IntegrityError, ResourceError
from longlora_cli.merging.plan import Ingredient, MergePlan
from longlora_cli.models.adapter_tensors import ADAPTER_CONFIG
from longlora_cli.models.rope import RopeRecord
from longlora_cli.models.source import RECORD
from longlora_cli.models.tensors import DTYPES
from longlora_cli.models.tokenizer import load_tokenizer
from longlora_cli.storage import MANIFEST, is_artifact, read_manifest, sha256_of

MIX_RECORD = "merge.json"
_TOKENIZER = "tokenizer.json"
_TOKENIZER_FILES = (
    _TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
# Config, tokenizer and card take a few megabytes; a large tokenizer.json has 17.
_SMALL_FILES_BYTES = 64 << 20


def require_space(out: Path, nbytes: int) -> None:
    """Refuse before the first byte when the disk cannot hold the result.

    Raises:
        ResourceError: Less than `nbytes` and the small files are free.
    """
    place = next(p for p in [out.absolute(), *out.absolute().parents] if p.exists())
    free, needed = shutil.disk_usage(place).free, nbytes + _SMALL_FILES_BYTES
    if free < needed:
        raise ResourceError(
            f"{out} needs {needed / 2**20:,.0f} MiB, the disk has {free / 2**20:,.0f} MiB free",
            rule="The result is written whole or not at all.",
            hint="Free some space or choose another --out.",
        )


def input_files(ingredients: Sequence[Ingredient]) -> dict[Path, str]:
    """Every file that the result is computed from, and what the card calls it: `source/file`."""
    files: dict[Path, str] = {}
    for ingredient in ingredients:
        base, adapter = ingredient.base, ingredient.adapter
        for path in [*base.files.files, base.folder / "config.json"]:
            files[path] = f"{base.name}/{path.name}"
        for path in [*adapter.files.files, adapter.folder / ADAPTER_CONFIG] if adapter else []:
            files[path] = f"{ingredient.name}/{path.name}"
    return files


def input_hashes(ingredients: Sequence[Ingredient], advance: Callable[[int], None]) -> dict[str, str]:
    """SHA-256 of every input by its name on the card.

    Raises:
        IntegrityError: A file differs from the manifest of its folder.
    """
    hashes = {}
    for path, name in input_files(ingredients).items():
        hashes[name] = sha256_of(path)
        advance(path.stat().st_size)
        if is_artifact(path.parent):
            entry = read_manifest(path.parent).files.get(path.name)
            if entry is not None and entry["sha256"] != hashes[name]:
                raise IntegrityError(f"{path} differs from its {MANIFEST} (sha256)")
    return hashes


def tokenizer_folder(ingredient: Ingredient) -> Path | None:
    """Where a source's tokenizer lies: beside its adapter, else in its model; None when it has none."""
    places = [ingredient.adapter.folder] if ingredient.adapter else []
    places.append(ingredient.base.folder)
    return next((p for p in places if any((p / name).is_file() for name in _TOKENIZER_FILES)), None)


def check_tokenizers(ingredients: Sequence[Ingredient]) -> list[str]:
    """Compare what turns text into ids; templates may differ, which is told.

    Returns:
        What the user should know.

    Raises:
        IncompatibleError: Two vocabularies differ, or one has ids without a row in the embedding.
    """
    notes: list[str] = []
    first: tuple[str, Any, str] | None = None
    for ingredient in ingredients:
        folder = tokenizer_folder(ingredient)
        if folder is None:
            continue
        content = _vocabulary(folder)
        _refuse_missing_rows(ingredient, content)
        template = _template(folder)
        if first is None:
            first = (ingredient.name, content, template)
        elif content != first[1]:
            raise IncompatibleError(
                f"{first[0]} and {ingredient.name} have different tokenizers",
                rule="Mixed models must mean the same by each token id.",
            )
        elif template != first[2]:
            notes.append(f"the chat templates differ; the one of {first[0]} is kept")
    return notes


def _vocabulary(folder: Path) -> dict[str, Any]:
    """What of tokenizer.json decides about ids; padding and truncation are a caller's settings."""
    path = folder / _TOKENIZER
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if key not in ("padding", "truncation")}


def _refuse_missing_rows(ingredient: Ingredient, content: dict[str, Any]) -> None:
    vocabulary = content.get("model", {}).get("vocab", {})
    size = max(vocabulary.values(), default=-1) if isinstance(vocabulary, dict) else len(vocabulary) - 1
    largest = max([size, *(token["id"] for token in content.get("added_tokens", []))])
    rows = ingredient.base.layout.parameters[ingredient.base.layout.embedding][0]
    if largest >= rows:
        raise IncompatibleError(
            f"the tokenizer of {ingredient.name} has the token id {largest:,}, its embedding only {rows:,} rows"
        )


def _template(folder: Path) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    return str(_read(config).get("chat_template")) if config.is_file() else ""


def write_companions(plan: MergePlan, dtype: str, staging: Path) -> None:
    """Write what stands beside the tensors: configs and tokenizer, or PEFT's config, the record and the tokenizer.

    Args:
        plan: What was written.
        dtype: The number format the user asked for, or `auto`.
        staging: The folder being made.
    """
    if plan.peft_config is None:
        _write_config(plan, dtype, staging)
    else:
        _write(staging / ADAPTER_CONFIG, plan.peft_config)
        if plan.record is not None:
            (staging / RECORD).write_text(plan.record.to_json(), encoding="utf-8")
    _write_tokenizer(plan.ingredients, plan.context_length, staging)
    if plan.peft_config is None:
        _end_answers(plan, staging)


def _write_tokenizer(ingredients: Sequence[Ingredient], context_length: int | None, staging: Path) -> None:
    """Copy the first tokenizer there is, with the length that the result can read."""
    folder = next((f for f in map(tokenizer_folder, ingredients) if f is not None), None)
    if folder is None:
        return
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, staging / name)
    config = staging / "tokenizer_config.json"
    if config.is_file() and context_length is not None:
        _write(config, _read(config) | {"model_max_length": context_length})


def _write_config(plan: MergePlan, dtype: str, staging: Path) -> None:
    """Write config.json and generation_config.json of a whole model.

    transformers 5 writes positions only as `rope_parameters`; llama.cpp's converter, vLLM and transformers 4 look for
    `rope_theta` and `rope_scaling`. Both are written, with equal content, and transformers 5 reads both alike.
    """
    base = plan.base
    content = _read(base.folder / "config.json")
    if plan.rope is not None:
        content |= config_keys(plan.rope)
    content["tie_word_embeddings"] = plan.tied
    if dtype != "auto":
        name = str(DTYPES[dtype]).removeprefix("torch.")
        content |= {"dtype": name, "torch_dtype": name}
    content.pop("_name_or_path", None)
    _write(staging / "config.json", content)
    if (base.folder / "generation_config.json").is_file():
        shutil.copyfile(base.folder / "generation_config.json", staging / "generation_config.json")


def _end_answers(plan: MergePlan, staging: Path) -> None:
    """Let the model stop where its template ends an answer, when it was trained with another one than its base's.

    Servers stop at the `eos_token_id` of generation_config.json, in which the base has its own template's.
    """
    if _template(staging) == _template(plan.base.folder) or not (staging / _TOKENIZER).is_file():
        return
    end = end_token_id(load_tokenizer(staging))
    path = staging / "generation_config.json"
    config = _read(staging / "config.json")
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    content = _read(path) if path.is_file() else {name: config[name] for name in names if name in config}
    stops = content.get("eos_token_id")
    known = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if end is not None and end not in known:
        _write(path, content | {"eos_token_id": [*known, end]})


def config_keys(rope: RopeRecord) -> dict[str, Any]:
    """A record as the keys of a config.json, in the new and the older spelling."""
    keys = {"rope_parameters": dict(rope.parameters), "max_position_embeddings": rope.max_position_embeddings}
    return keys | rope.legacy_keys()


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(
        json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def write_record(recipe: dict[str, Any], staging: Path, *, adapter: bool) -> None:
    """Write the recipe of a merge: `longlora.json` in a model, `merge.json` in an adapter, whose own record is kept."""
    _write(staging / (MIX_RECORD if adapter else RECORD), {"format": 1, "kind": "merge", **recipe})


def write_card(recipe: dict[str, Any], rope: RopeRecord | None, staging: Path) -> None:
    """Write README.md: what the folder was made of and how that was checked."""
    sources, weights = recipe["sources"], recipe["weights"]
    library = "peft" if recipe["adapter"] else "transformers"
    lines = ["---", f"library_name: {library}", "tags:", "- merge", "---", ""]
    lines += [f"# {Path(recipe['out']).name}", "", "Made by `longlora merge`.", ""]
    lines += ["| source | weight | kind |", "| --- | ---: | --- |"]
    lines += [f"| {s['name']} | {w:g} | {s['kind']} |" for s, w in zip(sources, weights, strict=True)]
    lines += ["", f"* method: {recipe['method']}, summed in float64, rounded once"]
    lines += [
        f"* base of the adapters: {name}"
        for name in sorted({s["base"] for s in sources if s["kind"] != "model"})
    ]
    lines += [f"* base weights: {recipe['base_weights']}"]
    if rope is not None:
        lines.append(f"* positions: {rope.describe()}, to {rope.max_position_embeddings:,} tokens")
    lines += [f"* probe: {recipe['probe_summary']}"]
    lines += [f"* {name} {version}" for name, version in sorted(recipe["versions"].items())]
    lines += ["", "## Inputs", "", "| file | sha256 |", "| --- | --- |"]
    lines += [f"| {name} | `{digest}` |" for name, digest in sorted(recipe["inputs"].items())]
    (staging / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
