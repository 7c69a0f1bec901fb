"""GPU memory of a step does not depend on how far the CPU runs ahead of the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import test_engine as fused
import test_generic as generic
import torch
from torch import nn

from longlora_cli.memory.arena import HostArena
from longlora_cli.memory.engine import use_engine
from longlora_cli.memory.generic import use_generic_engine

pytestmark = pytest.mark.gpu
LAYERS, TOKENS, WIDTH = 16, 8192, 512
INPUT_BYTES = TOKENS * WIDTH * 4


def on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to("cuda") if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def fused_step(group: int, arena: HostArena) -> Callable[[], Any]:
    model = fused.build(hidden_size=WIDTH, intermediate_size=1024, num_hidden_layers=LAYERS)
    model = model.float().to("cuda")
    groups = (group,) * (LAYERS // group)
    use_engine(model.get_base_model(), lambda _: fused.plan(groups, tile=2048, place="host"), arena=arena)
    inputs = on_gpu(fused.batch([[TOKENS]]))
    return lambda: fused.outcome(model, inputs)


def generic_step(group: int, arena: HostArena) -> Callable[[], Any]:
    model = generic.make(
        hidden_size=WIDTH, intermediate_size=1024, head_dim=128, num_hidden_layers=LAYERS, attention="sdpa",
        max_position_embeddings=TOKENS,
    ).float()  # fmt: skip
    model = model.to("cuda").requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    use_generic_engine(model, generic.plan(group=group, tile=2048, layers=LAYERS), arena)
    inputs = on_gpu(generic.batch(rows=1, tokens=TOKENS))
    return lambda: generic.step(model, inputs)


@pytest.fixture
def arena() -> Iterator[HostArena]:
    with HostArena(torch.device("cuda", 0), 2 * LAYERS * INPUT_BYTES) as made:
        yield made


def peak_bytes(step: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("make", [fused_step, generic_step])
def test_a_cpu_two_seconds_ahead_costs_at_most_two_more_layer_inputs(
    make: Callable[[int, HostArena], Callable[[], Any]],
    group: int,
    arena: HostArena,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = make(group, arena)
    step()  # what is made once: the arena's room, compiled kernels, workspaces

    def ahead() -> None:
        torch.cuda._sleep(4 * 10**9)  # about two seconds of the GPU's clock
        step()

    far = peak_bytes(ahead)
    run = nn.Module.__call__

    def in_turn(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        torch.cuda.synchronize()
        return run(module, *args, **kwargs)

    turn = HostArena.next_turn

    def next_turn(self: HostArena) -> None:
        torch.cuda.synchronize()
        turn(self)

    monkeypatch.setattr(nn.Module, "__call__", in_turn)
    monkeypatch.setattr(HostArena, "next_turn", next_turn)
    assert far <= peak_bytes(step) + 2 * INPUT_BYTES
