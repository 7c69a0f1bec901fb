"""An evaluation as the files that lm-evaluation-harness 0.4.13 (EleutherAI, MIT) writes with `--log_samples`.

Source of keys and rules: `loggers/evaluation_tracker.py`, `evaluator_utils.py`, `api/metrics.py`. Tasks keep their own
names, since prompts and rules may differ from those of the same name there; `versions` tells the scorer.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from longlora_cli.evaluation.export.names import folder_of

Row = Mapping[str, Any]
_NO_ERROR = "N/A"
# What answering gave; the rest of a row is the document.
_NOT_DOCUMENT = frozenset(
    ("key", "prediction", "references", "scores", "finish", "seconds", "extra", "log_likelihoods")
) | {"prompt_tokens", "reused_tokens", "new_tokens", "kv_bytes"}
# Of whole texts, by what the rows count them; bits per byte are no exponential, see `api/metrics.py`.
_ROLLING = {"word_perplexity": "words", "byte_perplexity": "bytes", "bits_per_byte": "bytes"}
_LOWER_IS_BETTER = frozenset((*_ROLLING, "perplexity"))


def lm_eval_files(
    results: Mapping[str, Any], rows: Mapping[str, Sequence[Row]], *, date: str
) -> dict[str, str]:
    """Results and samples.

    Args:
        results: `results.json`.
        rows: Task -> its samples.
        date: For the files' names, as `2026-01-31T09-30-00.000000`.

    Returns:
        Path -> content: `MODEL/results_DATE.json` and `MODEL/samples_TASK_DATE.jsonl`. Shares are from 0 to 1. RULER's
        metrics are its lengths, -1 in the samples of another length; standard errors are lm-eval's, the deviation of
        the samples over the root of their number, as if they were independent. `prompt_hash`, `arguments`, `git_hash`,
        `date`, `lm_eval_version` and `max_length` are not known; `task_hashes` are of the other hashes alone.
    """
    samples = {
        task: _samples(summary, rows[task], is_text=task == "ppl")
        for task, summary in results["tasks"].items()
    }
    folder = folder_of(results["model"]["name"])
    content = _content(results, samples)
    found = {f"{folder}/results_{date}.json": _json(content) + "\n"}
    for task, lines in samples.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        found[f"{folder}/samples_{task}_{date}.jsonl"] = text
    return found


def _content(results: Mapping[str, Any], samples: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    summaries = results["tasks"]
    metrics = {task: _metrics(task, summaries[task], lines) for task, lines in samples.items()}
    groups, subtasks = _groups(results)
    names = {
        task: list(
            dict.fromkeys(key.partition(",")[0] for key in found if "," in key and "_stderr" not in key)
        )
        for task, found in metrics.items()
    }
    better = {task: {name: name not in _LOWER_IS_BETTER for name in found} for task, found in names.items()}
    versions = {task: version for task in samples if (version := _version(summaries[task])) is not None}
    return {
        "results": metrics | groups,
        **({"groups": groups} if groups else {}),
        "group_subtasks": subtasks,
        "configs": {
            task: _config(task, summaries[task], better[task], versions.get(task)) for task in samples
        },
        "versions": versions,
        "n-shot": dict.fromkeys(samples, 0),
        "higher_is_better": better,
        "n-samples": {
            # Too long ones are skipped where that was asked for.
            task: {"original": len(lines) + summaries[task].get("skipped", 0), "effective": len(lines)}
            for task, lines in samples.items()
        },
        "config": _run_config(results),
        "transformers_version": results["versions"]["transformers"],
        "task_hashes": {task: _task_hash(lines) for task, lines in samples.items()},
        "model_source": "longlora",
        "model_name": results["model"]["name"],
        "model_name_sanitized": folder_of(results["model"]["name"]),
        **_template(results),
        "total_evaluation_time_seconds": str(results["seconds"]),
    }


def _template(results: Mapping[str, Any]) -> dict[str, Any]:
    """The chat template's hash, which both programs take of its text; null without one."""
    found = results.get("inputs", {}).get("chat_template")
    if found is None:
        return {}
    return {"chat_template_sha": None if found == _sha256("") else found}


def _run_config(results: Mapping[str, Any]) -> dict[str, Any]:
    settings, model = results["settings"], results["model"]
    arguments = {"pretrained": model["name"], "dtype": model["dtype"]}
    if settings.get("adapter") is not None:
        arguments["peft"] = str(settings["adapter"])
    limit = settings.get("max_samples")
    return {
        "model": "longlora",
        "model_args": arguments,
        "device": model["device"],
        "limit": None if limit is None else float(limit),
        "longlora_version": results["versions"]["longlora"],
    }


def _config(
    task: str, summary: Mapping[str, Any], better: Mapping[str, bool], version: str | None
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "task": task,
        "output_type": "loglikelihood_rolling" if task == "ppl" else "generate_until",
        "num_fewshot": 0,
        "metric_list": [{"metric": name, "higher_is_better": higher} for name, higher in better.items()],
    }
    if task.startswith("multiple_choice"):
        found["output_type"] = "multiple_choice"
    elif task != "ppl":
        found["generation_kwargs"] = {"do_sample": False}
    return found | ({} if version is None else {"metadata": {"version": version}})


def _version(summary: Mapping[str, Any]) -> str | None:
    """The versions of what judged; None for perplexity, which nothing judges."""
    named = summary.get("scorers", [summary["scorer"]] if "scorer" in summary else [])
    return ", ".join(named) or None


def _is_ruler(summary: Mapping[str, Any], rows: Iterable[Row]) -> bool:
    return str(summary.get("scorer", "")).startswith("ruler.") and all("length" in row for row in rows)


def _samples(summary: Mapping[str, Any], rows: Sequence[Row], *, is_text: bool) -> list[dict[str, Any]]:
    if is_text:
        return [_text_sample(number, row) for number, row in enumerate(rows)]
    lengths = sorted({row["length"] for row in rows}) if _is_ruler(summary, rows) else []
    return [_sample(number, row, lengths) for number, row in enumerate(rows)]


def _sample(number: int, row: Row, lengths: Sequence[int]) -> dict[str, Any]:
    document = {key: value for key, value in row.items() if key not in _NOT_DOCUMENT}
    if lengths:  # RULER's names there
        document["max_length"] = document.pop("length")
    document |= row.get("extra", {}) | {"outputs" if lengths else "references": row["references"]}
    scores: dict[str, float] = row["scores"]
    if lengths:
        scores = {str(length): scores["score"] if row["length"] == length else -1.0 for length in lengths}
    weights = row.get("log_likelihoods")
    target = str(row["references"][0] if len(row["references"]) == 1 else row["references"])
    return {
        "doc_id": number,
        "doc": document,
        "target": target,
        "resps": [[row["prediction"]]] if weights is None else [[str(weight)] for weight in weights],
        "filtered_resps": [row["prediction"]],
        "filter": "none",
        "metrics": list(scores),
        "doc_hash": _sha256(_json(document)),
        "target_hash": _sha256(target),
        **scores,
    }


def _text_sample(number: int, row: Row) -> dict[str, Any]:
    document = {key: row[key] for key in ("text", "n", "bytes", "words")}
    likelihood = -row["nll"] * row["n"]
    return {
        "doc_id": number,
        "doc": document,
        "resps": [[str(likelihood)]],
        "filtered_resps": [str(likelihood)],
        "filter": "none",
        "metrics": list(_ROLLING),
        "doc_hash": _sha256(_json(document)),
        **{metric: [likelihood, row[unit]] for metric, unit in _ROLLING.items()},
    }


def _metrics(task: str, summary: Mapping[str, Any], lines: Sequence[Row]) -> dict[str, Any]:
    found: dict[str, Any] = {"alias": task, "sample_len": len(lines)}
    if task == "ppl":
        # Exact ones have no filter; those by another program's rule have its name for one.
        every = {"none": summary} | summary.get("compat", {})
        for rule, numbers in every.items():
            for name in (*_ROLLING, "perplexity"):
                if numbers.get(name) is not None:
                    found |= {f"{name},{rule}": numbers[name], f"{name}_stderr,{rule}": _NO_ERROR}
        return found
    is_ruler = all(name.isdigit() for name in lines[0]["metrics"])
    for name in lines[0]["metrics"]:
        values = [line[name] for line in lines if not (is_ruler and line[name] == -1.0)]
        found[f"{name},none"] = math.fsum(values) / len(values)
        found[f"{name}_stderr,none"] = _NO_ERROR if is_ruler else _error(values)
    return found


def _error(values: Sequence[float]) -> float | str:
    if len(values) < 2:
        return _NO_ERROR
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _groups(results: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]]]:
    groups, subtasks = {}, {}
    for name, group in results.get("groups", {}).items():
        scores = {f"{length['length']},none": length["score"] for length in group["lengths"]}
        groups[name] = {"alias": name, "sample_len": group["n"], **_without_errors(scores)}
        subtasks[name] = list(group["tasks"])
    for name, benchmark in results.get("benchmarks", {}).items():
        scores = {"score,none": benchmark["score"]}
        scores |= {f"{column},none": score for column, score in benchmark["columns"].items()}
        groups[name] = {"alias": name, "sample_len": benchmark["n"], **_without_errors(scores)}
        subtasks[name] = [f"{name}.{task}" for task in benchmark["tasks"]]
    return groups, subtasks


def _without_errors(scores: Mapping[str, float]) -> dict[str, Any]:
    errors = {key.replace(",", "_stderr,"): _NO_ERROR for key in scores}
    return {**scores, **errors}


def _task_hash(lines: Sequence[Row]) -> str:
    return _sha256("".join(line["doc_hash"] + line.get("target_hash", "") for line in lines))


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
