"""What a training of beacons calls in place of the model: a batch of documents in, its loss out.

It is a module around the model, so that Trainer and DDP see the parameters of both; nothing of the model is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from torch import Tensor, nn

from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.beacon.training import window_losses
from longlora_cli.models.loading import LoadedModel


class BeaconObjective(nn.Module):
    """The loss of documents that are read window by window.

    Args:
        loaded: Model with beacons on it.
        settings: Windows and ratios.
        seed: Of the ratios.
        step: Number of the optimizer step that is being computed. All its micro-batches, on every process, draw
            the same ratios: so they call the model equally often, two processes compute what one does, and a resumed
            run draws what an uninterrupted one would, without a generator's state.
        tile_tokens: Rows of logits held at once.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        settings: BeaconSettings,
        *,
        seed: int,
        step: Callable[[], int],
        tile_tokens: int,
    ) -> None:
        super().__init__()
        self.model = loaded.model
        self._loaded, self._settings, self._seed, self._step = loaded, settings, seed, step
        self._tile_tokens = tile_tokens

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        document_lengths: list[list[int]],
        num_items_in_batch: Any = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        """The loss of one micro-batch.

        Args:
            input_ids: `[batch, tokens]`, padded on the right.
            labels: `[batch, tokens]`, not shifted.
            document_lengths: Tokens of each row's document, and behind it those of its padding, which is not read:
                compressed with the text it would break the schedule of its windows.
            num_items_in_batch: Labels of the whole step; by default those of this batch.

        Returns:
            `loss`: the summed loss over that number.
        """
        lengths = [row[0] for row in document_lengths]
        total, count = window_losses(
            self._loaded.causal_lm,
            self._settings,
            [ids[:tokens] for ids, tokens in zip(input_ids, lengths, strict=True)],
            [targets[:tokens] for targets, tokens in zip(labels, lengths, strict=True)],
            Random(f"{self._seed}:ratios:{self._step()}"),
            tile_tokens=self._tile_tokens,
            limit=self._loaded.rope.max_position_embeddings,
        )
        divisor = count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / divisor}
