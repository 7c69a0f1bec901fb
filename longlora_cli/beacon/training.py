"""The training loss: every raw token predicted from the beacons of the windows before and the raw tokens of its own.

What is computed is computed again in the backward pass, and little is kept until then (Chen et al. 2016,
arXiv:1604.06174). Where all windows of a batch go in one pass, every layer is checkpointed (`layerwise`): its input is
kept, and one layer's activations exist. Where they take several passes, these are checkpointed whole: a pass is a
function of its ids and of the beacons before it, so that nothing but beacons is kept (keys and values, a ratio-th of
what raw tokens would take), and one pass's activations of all layers exist. Gradients flow through all beacons to every
earlier window (Zhang et al. 2024, arXiv:2401.03462). Logits exist a tile at a time (`memory/loss.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longlora_cli.beacon.cache import BeaconMemory
from longlora_cli.beacon.passes import Pass, plan_pass, run_pass
from longlora_cli.beacon.projections import BeaconProjections, projections_of
from longlora_cli.beacon.ratios import RatioSource
from longlora_cli.beacon.rotation import frequencies
from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.beacon.windows import WindowStep, training_steps
from longlora_cli.errors import IncompatibleError, SettingsError
from longlora_cli.memory.loss import IGNORE, head_weight, tiled_loss


def trains_first_window(settings: BeaconSettings) -> bool:
    """True when later raw tokens of the first window see beacons of their own window, so that it has what to learn."""
    return settings.position == "interleave" and settings.attention == "full-coverage"


def shifted_labels(labels: Tensor, settings: BeaconSettings) -> Tensor:
    """Labels moved to the token that predicts them, once for the whole sequence.

    Args:
        labels: `[tokens]`, the token itself or `IGNORE`.
        settings: Decide whether the first window counts.

    Returns:
        `[tokens]`; the last is `IGNORE`, and so is the first window unless `trains_first_window`.
    """
    moved = torch.cat((labels[1:], labels.new_full((1,), IGNORE)))
    if not trains_first_window(settings):
        moved[: settings.window] = IGNORE
    return moved


@dataclass(frozen=True, eq=False)
class _Job:
    """What does not change between the passes of a batch."""

    decoder: Any
    head: Tensor
    projections: BeaconProjections
    inv_freq: Tensor
    dtype: torch.dtype
    tile_tokens: int
    recompute: bool

    def run(
        self, plan: Pass, tokens: Tensor, targets: Tensor, held: Sequence[Tensor], *, only: bool
    ) -> tuple[Any, ...]:
        """`_window`, of which backward computes everything again: layer by layer if it is the only pass, else all."""
        recompute = self.recompute and torch.is_grad_enabled()
        if recompute and not only:
            result: tuple[Any, ...] = checkpoint(
                _window, self, plan, tokens, targets, False, *held, use_reentrant=False
            )
            return result
        return _window(self, plan, tokens, targets, recompute, *held)


class _Past:
    """What earlier passes of a batch left, one tensor a pass, and which rows are whose."""

    def __init__(self, sequences: int) -> None:
        self._closed: list[Tensor] = []
        self._open: list[Tensor] = []
        self._rows = 0
        self._closed_spans: list[list[tuple[int, int]]] = [[] for _ in range(sequences)]
        self._open_counts = [0] * sequences

    @property
    def pieces(self) -> list[Tensor]:
        """Each `[layers, rows, 2, kv_heads, head_dim]`."""
        return [*self._closed, *self._open]

    @property
    def spans(self) -> list[list[tuple[int, int]]]:
        """Of each sequence its rows in the pieces put behind each other: its memory, then what stayed raw."""
        found, start = [], self._rows
        for closed, count in zip(self._closed_spans, self._open_counts, strict=True):
            found.append([*closed, *([(start, start + count)] if count else [])])
            start += count
        return found

    def add(self, sequences: Sequence[int], plan: Pass, closed: Tensor | None, stays: Tensor | None) -> None:
        """Take what a pass over these sequences left."""
        for sequence, count in zip(sequences, plan.kept_counts, strict=True):
            self._closed_spans[sequence] += [(self._rows, self._rows + count)] if count else []
            self._rows += count
        self._open_counts = [0] * len(self._open_counts)
        for sequence, count in zip(sequences, plan.stay_counts, strict=True):
            self._open_counts[sequence] = count
        self._closed += [] if closed is None else [closed]
        self._open = [] if stays is None else [stays]


def window_losses(
    model: Any,
    settings: BeaconSettings,
    ids: Sequence[Tensor] | Tensor,
    labels: Sequence[Tensor] | Tensor,
    generator: Random | None = None,
    *,
    tile_tokens: int = 4096,
    limit: int | None = None,
    recompute: bool = True,
) -> tuple[Tensor, Tensor]:
    """Sum the next-token losses of a batch, window by window.

    Args:
        model: A causal LM with beacons attached (`LoadedModel.causal_lm`), in training mode or not.
        settings: The plan.
        ids: `[batch, tokens]`, or a sequence of rows `[tokens]` of any lengths; no padding.
        labels: As `ids`, not shifted: the token itself, or `IGNORE`.
        generator: Draws the ratios, shared by the rows: the caller's, so that processes can be kept in step.
        tile_tokens: Tokens whose logits exist at one time.
        limit: Positions the model can use, for `adapt-N`.
        recompute: Checkpoint windows; False keeps all activations.

    Returns:
        Summed loss in nats and the number of labels that counted. Divide after all batches and ranks are added. A
        batch whose rows have no more tokens than a window trains no beacon.

    Raises:
        SettingsError: Settings that cannot be used in training.
        IncompatibleError: No beacons on the model, or a head that is more than a matrix.
    """
    job = _job(model, settings, tile_tokens, recompute)
    rows = list(ids)
    ratios = _ratios(rows, settings, generator, limit)
    moved = [shifted_labels(row, settings) for row in labels]
    wide = job.dtype == torch.float64
    total = torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=rows[0].device)
    past = _Past(len(rows))
    passes = list(_passes(rows, settings, ratios))
    for steps in passes:
        windows = [(n, of_row) for n, _, of_row in steps]
        plan = plan_pass(windows, past.spans, job.inv_freq, job.dtype, collect=True)
        spans = [(n, start, start + sum(w.tokens for w in of_row)) for n, start, of_row in steps]
        tokens = torch.cat([rows[n][start:stop] for n, start, stop in spans])
        targets = torch.cat([moved[n][start:stop] for n, start, stop in spans])
        loss, closed, stays = job.run(plan, tokens, targets, past.pieces, only=len(passes) == 1)
        total = total + loss
        past.add([n for n, *_ in spans], plan, closed, stays)
    return total, sum((row.ne(IGNORE).sum() for row in moved), torch.zeros_like(moved[0][0]))


def _job(model: Any, settings: BeaconSettings, tile_tokens: int, recompute: bool) -> _Job:
    projections, head = projections_of(model), head_weight(model)
    if projections is None or head is None:
        what = "beacons" if projections is None else "output head that is one matrix"
        raise IncompatibleError(f"the model has no {what}", rule="Training beacons needs both.")
    if set(projections.names) != set(settings.projections):
        raise IncompatibleError(
            f"beacons with projections {','.join(projections.names)}, settings with {','.join(settings.projections)}"
        )
    decoder = model.get_decoder()
    weight = decoder.get_input_embeddings().weight
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inv_freq = frequencies(decoder, head_dim).to(weight.device)
    return _Job(decoder, head, projections, inv_freq, weight.dtype, tile_tokens, recompute)


def _ratios(
    rows: Sequence[Tensor], settings: BeaconSettings, generator: Random | None, limit: int | None
) -> RatioSource:
    longest = max(len(row) for row in rows)
    try:
        settings.validate()
        ratios = RatioSource(settings, generator=generator, limit=limit, training=True, tokens=longest)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    ratios.expect(longest)
    return ratios


def _passes(
    rows: Sequence[Tensor], settings: BeaconSettings, ratios: RatioSource
) -> Iterator[list[tuple[int, int, list[WindowStep]]]]:
    """Forward passes: for each row that takes part its number, its first token, its windows (`parallel` at most)."""
    plans = [list(training_steps(len(row), settings, ratios.of_window)) for row in rows]
    for first in range(0, max(len(plan) for plan in plans), settings.parallel):
        chosen = [(n, plan[first : first + settings.parallel]) for n, plan in enumerate(plans)]
        yield [(n, part[0][1].tokens, [step for step, _ in part]) for n, part in chosen if part]


def _window(
    job: _Job, plan: Pass, tokens: Tensor, targets: Tensor, recompute_layers: bool, *pieces: Tensor
) -> tuple[Tensor | None, ...]:
    """One forward pass: its loss, the memory that its windows leave, the rows that stay raw.

    A piece of memory is `[layers, rows, 2, kv_heads, head_dim]`, of all sequences: a pass saves few tensors.
    """
    memory = BeaconMemory(1, len(job.decoder.layers), collect=True)
    if pieces:
        held = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        memory.held = list(held.unbind(0))
    hidden = run_pass(job.decoder, job.projections, memory, tokens, plan, recompute_layers=recompute_layers)
    loss, _ = tiled_loss(hidden, job.head, targets, tile_tokens=job.tile_tokens)
    closed, stays = (torch.stack(rows) if rows else None for rows in (memory.closed, memory.open))
    return loss, closed, stays
