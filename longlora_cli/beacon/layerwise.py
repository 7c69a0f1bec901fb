"""Recomputing layer by layer: a pass over all windows of a batch, of which one layer's activations exist at a time.

Within a layer nothing is sequential: a window's beacons at one layer come from that window's states at the same layer.
So all windows can go through a layer together, and the layer be checkpointed like any other (Chen et al. 2016,
arXiv:1604.06174): its input is kept, one vector a row, and its forward pass is run again in the backward pass. Where a
batch takes several passes, `training` checkpoints each as a whole and nothing but beacons is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longlora_cli.beacon.cache import BeaconMemory
from longlora_cli.beacon.projections import BeaconProjections


@contextmanager
def recomputed_layers(
    decoder: Any, projections: BeaconProjections, memory: BeaconMemory, raw: int | None
) -> Iterator[None]:
    """While it is open, every decoder layer is checkpointed; each gets what it needs of the pass anew.

    Args:
        decoder: Its layers; their own `forward` shows again afterwards.
        projections: Routed in the layer's second run, too, which comes when the pass is long over.
        memory: Has begun a pass; it gets no rows, because no pass follows.
        raw: Rows before the beacons; None where there are none.
    """
    hidden_by: list[tuple[nn.Module, Any]] = []

    def wrapped(number: int, original: Any) -> Any:
        def once(hidden: Tensor, own: dict[str, Any]) -> Tensor:
            with projections.route(raw):
                out: Tensor = original(hidden, **own, past_key_values=memory.alone(number))
            return out

        def forward(hidden_states: Tensor, **given: Any) -> Tensor:
            own = {name: value for name, value in given.items() if name != "past_key_values"}
            result: Tensor = checkpoint(once, hidden_states, own, use_reentrant=False)
            return result

        return forward

    try:
        for number, layer in enumerate(decoder.layers):
            hidden_by.append((layer, layer.__dict__.get("forward")))
            layer.forward = wrapped(number, layer.forward)
        yield
    finally:
        for layer, before in hidden_by:
            if before is None:
                del layer.forward
            else:
                layer.forward = before
