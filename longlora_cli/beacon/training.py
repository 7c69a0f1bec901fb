"""The training loss: every raw token predicted from the beacons of the windows before and the raw tokens of its own.

Windows are checkpointed whole: one forward pass is a function of its ids and of the beacons before it, so that between
forward and backward nothing is kept but beacons (keys and values, a ratio-th of what raw tokens would take). Gradients
flow through all of them to every earlier window (Zhang et al. 2024, arXiv:2401.03462); recomputation: Chen et al. 2016
(arXiv:1604.06174). Logits exist a tile at a time (`memory/loss.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longlora_cli.beacon.cache import BeaconMemory, Rows
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
        self, plan: Pass, tokens: Tensor, targets: Tensor, held: Sequence[Sequence[Tensor]]
    ) -> tuple[Any, ...]:
        """`_window`, of which backward computes everything again."""
        pieces = [piece for of_row in held for piece in of_row]
        counts = [len(of_row) for of_row in held]
        if self.recompute and torch.is_grad_enabled():
            result: tuple[Any, ...] = checkpoint(
                _window, self, plan, tokens, targets, counts, *pieces, use_reentrant=False
            )
            return result
        return _window(self, plan, tokens, targets, counts, *pieces)


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
    memory: list[list[Tensor]] = [[] for _ in rows]
    staying: list[list[Tensor]] = [[] for _ in rows]
    for steps in _passes(rows, settings, ratios):
        plan = plan_pass([(n, windows) for n, _, windows in steps], job.inv_freq, job.dtype)
        spans = [(n, start, start + sum(w.tokens for w in windows)) for n, start, windows in steps]
        tokens = torch.cat([rows[n][start:stop] for n, start, stop in spans])
        targets = torch.cat([moved[n][start:stop] for n, start, stop in spans])
        loss, *left = job.run(plan, tokens, targets, [memory[n] + staying[n] for n, *_ in spans])
        total = total + loss
        for (n, *_), closed, stays in zip(spans, left[: len(spans)], left[len(spans) :], strict=True):
            memory[n] += [] if closed is None else [closed]
            staying[n] = [] if stays is None else [stays]
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
    job: _Job, plan: Pass, tokens: Tensor, targets: Tensor, counts: Sequence[int], *pieces: Tensor
) -> tuple[Tensor | None, ...]:
    """One forward pass: its loss, for each sequence the memory that its windows leave, for each the rows that stay raw.

    A piece of memory is `[layers, 2, kv_heads, rows, head_dim]`: one tensor, so that a pass saves few.
    """
    memory = BeaconMemory(
        1 + max(part.sequence for part in plan.parts), len(job.decoder.layers), collect=True
    )
    first = 0
    for part, count in zip(plan.parts, counts, strict=True):
        if count:
            held = torch.cat(pieces[first : first + count], dim=3)
            memory.rows[part.sequence] = [Rows(*layer.unbind(0)) for layer in held.unbind(0)]
        first += count
    hidden = run_pass(job.decoder, job.projections, memory, tokens, plan)
    loss, _ = tiled_loss(hidden, job.head, targets, tile_tokens=job.tile_tokens)
    left = [rows[part.sequence] for rows in (memory.closed, memory.open) for part in plan.parts]
    return loss, *(_packed(layers) for layers in left)


def _packed(layers: Sequence[Rows | None]) -> Tensor | None:
    held = [torch.stack(rows) for rows in layers if rows is not None]
    return torch.stack(held) if held else None
