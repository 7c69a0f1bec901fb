"""Evaluation inside training: the same losses and answers as `longlora eval`, on the model as it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from longlora_cli.beacon.choice import evaluated
from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.beacon.training import trains_first_window, window_losses
from longlora_cli.config import TrainConfig
from longlora_cli.data.dataset import ChunkDataset
from longlora_cli.data.long_documents import LongDocuments
from longlora_cli.errors import DataError, SettingsError
from longlora_cli.evaluation.answerer import SessionAnswerer
from longlora_cli.evaluation.generation import evaluate_generation
from longlora_cli.evaluation.metrics import load_metrics
from longlora_cli.evaluation.perplexity import evaluate_chunks
from longlora_cli.evaluation.tasks.rows import read_questions
from longlora_cli.models.loading import LoadedModel
from longlora_cli.parallel.mesh import Mesh

Evaluator = Callable[[], dict[str, float]]
_METRICS = ["rouge", "f1", "exact_match", "accuracy"]
# Tokens read at one time before an answer; the default of `eval` and `chat`.
_PREFILL_CHUNK = 4096


def check_eval_data(config: TrainConfig) -> None:
    """Refuse evaluation data that does not fit the method, before a model is loaded.

    Raises:
        SettingsError: A prepared folder for generation, or a file for perplexity.
    """
    path = config.eval_data
    if path is None:
        return
    if config.eval_method == "perplexity" and not path.is_dir():
        raise SettingsError(
            f"--eval-data {path} is not a folder",
            rule="Perplexity is measured on data made by longlora prepare.",
            hint="Prepare the file, or give --eval-method generation.",
        )
    if config.eval_method == "generation" and path.is_dir():
        raise SettingsError(
            f"--eval-data {path} is a folder",
            rule="Generation is measured on a .jsonl file of questions and answers.",
        )


def make_evaluator(config: TrainConfig, loaded: LoadedModel, mesh: Mesh) -> Evaluator:
    """A function that measures the model now; every process takes its share and all get the whole result.

    Args:
        config: Method, data and limits.
        loaded: The model in training.
        mesh: The processes.

    Raises:
        DataError, NotFoundError, IncompatibleError: The data cannot be used.
    """
    assert config.eval_data is not None
    if loaded.beacons is not None:
        return _beacon_perplexity(config, evaluated(config, loaded.beacons), config.eval_data, loaded, mesh)
    if config.eval_method == "perplexity":
        return _perplexity(config, config.eval_data, loaded, mesh)
    return _generation(config, config.eval_data, loaded, mesh)


def _perplexity(config: TrainConfig, path: Path, loaded: LoadedModel, mesh: Mesh) -> Evaluator:
    chunks = ChunkDataset.open(path)
    chunks.require_tokenizer(loaded.tokenizer, config.chat_template)
    number = min(len(chunks), config.eval_samples or len(chunks))
    mine = [chunks[index] for index in range(mesh.rank, number, mesh.world)]

    def evaluate() -> dict[str, float]:
        losses = evaluate_chunks(loaded, mine, tile_tokens=config.loss_tile)
        sums = torch.tensor([losses.total, losses.count], dtype=torch.float64, device=loaded.device)
        total, count = mesh.sum(sums).tolist()
        nll = total / count
        return {"nll": nll, "perplexity": math.exp(min(nll, 700.0)), "tokens": count}

    return evaluate


def _beacon_perplexity(
    config: TrainConfig, settings: BeaconSettings, path: Path, loaded: LoadedModel, mesh: Mesh
) -> Evaluator:
    """Perplexity of the documents that are longer than a window, of the tokens that training would learn."""
    chunks = ChunkDataset.open(path)
    chunks.require_tokenizer(loaded.tokenizer, config.chat_template)
    documents = LongDocuments(
        chunks, settings.window, settings.hop, learn_first=trains_first_window(settings)
    )
    number = min(len(documents), config.eval_samples or len(documents))
    if not number:
        raise DataError(
            f"--eval-data {path} has no document longer than --beacon-window {settings.window:,}",
            rule="A document of one window is never compressed, so it says nothing of beacons.",
        )
    mine = [documents[index] for index in range(mesh.rank, number, mesh.world)]

    def evaluate() -> dict[str, float]:
        sums = torch.zeros(2, dtype=torch.float64, device=loaded.device)
        for document in mine:
            ids, labels = (
                torch.from_numpy(values.astype("int64"))[None].to(loaded.device)
                for values in (document.input_ids, document.labels)
            )
            total, count = window_losses(
                loaded.causal_lm, settings, ids, labels, None, tile_tokens=config.loss_tile
            )
            sums += torch.stack((total.double(), count.double()))
        total, count = mesh.sum(sums).tolist()
        nll = total / count
        return {"nll": nll, "perplexity": math.exp(min(nll, 700.0)), "tokens": count}

    return evaluate


def _generation(config: TrainConfig, path: Path, loaded: LoadedModel, mesh: Mesh) -> Evaluator:
    questions = read_questions(path, loaded.tokenizer, max_samples=config.eval_samples)
    metrics = load_metrics(_METRICS)
    mine = questions[mesh.rank :: mesh.world]

    def evaluate() -> dict[str, float]:
        answerer = SessionAnswerer(loaded, prefill_chunk=_PREFILL_CHUNK)
        scores = {}
        if mine:
            outcome = evaluate_generation(answerer, mine, metrics, max_new_tokens=config.eval_new_tokens)
            scores = {name: (s["score"] * s["n"], s["n"]) for name, s in outcome["scores"].items()}
        shares = mesh.gather(scores)
        names = sorted({name for share in shares for name in share})
        pairs = {name: [share[name] for share in shares if name in share] for name in names}
        return {name: sum(s for s, _ in pair) / sum(n for _, n in pair) for name, pair in pairs.items()}

    return evaluate
