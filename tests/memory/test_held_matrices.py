"""Small models hold their layers' matrices ready; what trains is written into them again in every step."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from test_engine import batch, build, outcome, plain_outcome, plan

from longlora_cli.memory.arena import HostArena
from longlora_cli.memory.engine import FusedEngine, use_engine
from longlora_cli.memory.plan import HELD_BYTES, ModelShape

CPU = torch.device("cpu")


def shape_of(wrapped: Any, rank: int = 3) -> ModelShape:
    config = wrapped.get_base_model().config
    return ModelShape(
        layers=config.num_hidden_layers, width=config.hidden_size, heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads, head_dim=config.hidden_size // config.num_attention_heads,
        intermediate=config.intermediate_size, vocabulary=config.vocab_size, element_bytes=8, weight_bytes=0,
        trainable=0, lora_rank=rank,
    )  # fmt: skip


def engine_of(wrapped: Any) -> FusedEngine:
    return FusedEngine(wrapped.get_base_model(), lambda tokens: plan((2, 3)), HostArena(CPU, 1 << 24))


def test_the_planner_counts_the_bytes_that_the_engine_holds() -> None:
    wrapped = build()
    engine = engine_of(wrapped)
    loaded = [layer.load(torch.float64, CPU) for layer in engine.layers]
    stacks = [s for layer in loaded for s in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    held = sum(s.weight.nbytes + (0 if s.down is None else s.down.nbytes) for s in stacks)
    assert held == shape_of(wrapped).held_bytes > 0


def test_a_second_pass_makes_no_new_matrices() -> None:
    layer = engine_of(build()).layers[0]
    first = layer.load(torch.float64, CPU)
    again = layer.load(torch.float64, CPU, again=True)
    assert again.qkv.weight.data_ptr() == first.qkv.weight.data_ptr()


def test_what_an_optimizer_changed_is_used_in_the_next_step() -> None:
    wrapped, inputs = build(), batch([[20, 1, 9]])
    arena = HostArena(CPU, 1 << 24)
    undo = use_engine(wrapped.get_base_model(), lambda tokens: plan((2, 3)), arena=arena)
    outcome(wrapped, inputs)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora" in name:
                parameter.data.add_(0.05)  # through `.data`, as some optimizers do: no version tells of it
    found, found_grads = outcome(wrapped, inputs)
    undo()
    arena.close()
    loss, grads = plain_outcome(wrapped, inputs)
    torch.testing.assert_close(found, loss, rtol=1e-12, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(found_grads[name], grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("change", [{"quantized": True}, {"layers": 10**6}], ids=["quantized", "large"])
def test_quantized_and_large_models_hold_nothing(change: dict[str, Any]) -> None:
    shape = shape_of(build())
    assert shape.held_bytes <= HELD_BYTES
    assert dataclasses.replace(shape, **change).held_bytes == 0
