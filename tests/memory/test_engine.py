"""The fused path computes transformers' own loss and gradients."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Server
from torch import Tensor

from longlora_cli.memory.arena import HostArena
from longlora_cli.memory.attention import attention_name
from longlora_cli.memory.engine import fused_fault, use_engine
from longlora_cli.memory.plan import LayerPlan, MemoryPlan

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def build(
    family: str = "Llama", *, targets: list[str] | None = None, also: list[str] | None = None, **changes: Any
) -> Any:
    """A random causal LM in float64 with LoRA on it, whose B matrices are not zero."""
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    config._attn_implementation = attention_name("auto", torch.device("cpu"))
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=config._attn_implementation
    ).double()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    wrapped = get_peft_model(
        model,
        LoraConfig(
            r=3,
            lora_alpha=5,
            target_modules=targets or ALL,
            modules_to_save=also,
            ensure_weight_tying=also is not None and model.config.tie_word_embeddings,
        ),
        autocast_adapter_dtype=False,
    ).double()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    for module in wrapped.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(norm_in_float64, module)
    wrapped.train()
    return wrapped


def norm_in_float64(module: Any, x: Tensor) -> Tensor:
    """RMSNorm as transformers writes it, but not in float32 where all else is float64."""
    eps = module.variance_epsilon
    return module.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def plan(
    groups: tuple[int, ...],
    tile: int = 7,
    place: str = "gpu",
    kept: dict[int, dict[str, str]] | None = None,
    **more: Any,
) -> MemoryPlan:
    """Groups of these sizes, all inputs at one place, and what single layers keep besides."""
    layers = []
    for size in groups:
        for position in range(size):
            layers.append(
                {
                    "input": place if position == 0 else "recompute",
                    "attention": "recompute",
                    "qkv": "recompute",
                    "gate_up": "recompute",
                }
            )
    for index, places in (kept or {}).items():
        layers[index] |= places
    return MemoryPlan(
        tokens=0,
        layers=tuple(LayerPlan(**layer) for layer in layers),
        inner_input=place,
        inner_attention=place,
        tile_tokens=tile,
        loss_tile=5,
        **{"kv_heads_per_call": 0, "shifted_group": 0} | more,
        predicted=None,
    )


def batch(documents: list[list[int]]) -> dict[str, Any]:
    tokens = sum(documents[0])
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 97, (len(documents), tokens), generator=generator)
    labels = ids.clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.4] = -100
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in documents])
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "document_lengths": documents}


def outcome(wrapped: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    wrapped.zero_grad()
    loss = wrapped.get_base_model()(**inputs, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in wrapped.named_parameters() if p.grad is not None}


def plain_outcome(wrapped: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """transformers' own layers, norm and head, with all logits."""
    wrapped.zero_grad()
    rest = {k: v for k, v in inputs.items() if k != "labels"}
    logits = wrapped.get_base_model()(**rest, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in wrapped.named_parameters() if p.grad is not None}


def assert_same(wrapped: Any, chosen: MemoryPlan, documents: list[list[int]] | None = None) -> None:
    inputs = batch(documents or [[20, 1, 9]])
    loss, grads = plain_outcome(wrapped, inputs)
    arena = HostArena(torch.device("cpu"), 1 << 24)
    undo = use_engine(wrapped.get_base_model(), lambda tokens: chosen, arena=arena)
    try:
        found, found_grads = outcome(wrapped, inputs)
    finally:
        undo()
        arena.close()
    torch.testing.assert_close(found, loss, rtol=1e-12, atol=0)
    assert found_grads.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(
            found_grads[name], grad, rtol=1e-10, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}"
        )


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: build(),
    "llama tied, biases": lambda: build(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "mistral, wide heads": lambda: build("Mistral", head_dim=16, sliding_window=None),
    "qwen2": lambda: build("Qwen2"),
    "qwen3": lambda: build("Qwen3", head_dim=12),
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_loss_and_every_gradient_are_those_of_the_models_own_code(family: str) -> None:
    assert_same(FAMILIES[family](), plan((2, 3)))


@pytest.mark.parametrize("groups", [(1, 1, 1, 1, 1), (5,), (1, 4), (2, 2, 1)])
@pytest.mark.parametrize("place", ["gpu", "host"])
def test_grouping_and_place_change_nothing(groups: tuple[int, ...], place: str) -> None:
    assert_same(build(), plan(groups, place=place))


@pytest.mark.parametrize("item", ["attention", "qkv", "gate_up"])
@pytest.mark.parametrize("place", ["gpu", "host"])
def test_what_layers_keep_changes_nothing(item: str, place: str) -> None:
    kept = {0: {item: place}, 2: {item: place}, 4: {item: place}}
    assert_same(build(), plan((1, 2, 2), kept=kept))


def test_keeping_everything_changes_nothing() -> None:
    everything = {"attention": "gpu", "qkv": "gpu", "gate_up": "gpu"}
    assert_same(build("Qwen3", head_dim=12), plan((1,) * 5, kept=dict.fromkeys(range(5), everything)))


@pytest.mark.parametrize("tile", [1, 4, 29, 30, 1000])
def test_tiles_change_nothing(tile: int) -> None:
    assert_same(build(), plan((2, 3), tile=tile))


@pytest.mark.parametrize("documents", [[[30]], [[2]], [[1, 1, 1]], [[5, 7], [12]], [[3, 9], [6, 6]]])
def test_documents_and_rows_stay_apart(documents: list[list[int]]) -> None:
    assert_same(build(), plan((2, 3)), documents)


def test_one_token_alone_has_no_loss() -> None:
    wrapped = build()
    undo = use_engine(
        wrapped.get_base_model(), lambda tokens: plan((5,)), arena=HostArena(torch.device("cpu"), 1 << 20)
    )
    loss, grads = outcome(wrapped, batch([[1]]))
    undo()
    assert loss == 0
    assert all(not grad.any() for grad in grads.values())


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"], ["k_proj", "up_proj", "o_proj"]])
def test_adapters_on_some_layers_only(targets: list[str]) -> None:
    assert_same(build(targets=targets), plan((2, 3)))


@pytest.mark.parametrize("tied", [False, True])
def test_norms_and_embeddings_are_trained_too(tied: bool) -> None:
    also = ["input_layernorm", "post_attention_layernorm", "norm", "embed_tokens"]
    assert_same(build(also=also if tied else [*also, "lm_head"], tie_word_embeddings=tied), plan((2, 3)))


def test_head_norms_of_qwen3_are_trained_too() -> None:
    assert_same(build("Qwen3", head_dim=12, also=["q_norm", "k_norm"]), plan((2, 3)))


def test_extended_positions_keep_their_attention_factor() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    assert_same(build(rope_parameters=yarn), plan((2, 3)))


def test_the_decoder_alone_gives_the_models_own_hidden_states() -> None:
    wrapped = build()
    inputs = {k: v for k, v in batch([[20, 10], [30]]).items() if k != "labels"}
    decoder = wrapped.get_base_model().get_decoder()
    with torch.no_grad():
        expected = decoder(**inputs, use_cache=False).last_hidden_state
        undo = use_engine(
            wrapped.get_base_model(), lambda n: plan((5,)), arena=HostArena(torch.device("cpu"), 1 << 20)
        )
        found = decoder(**inputs, use_cache=False).last_hidden_state
        undo()
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_undo_restores_the_models_own_code() -> None:
    model = build().get_base_model()
    undo = use_engine(model, lambda tokens: plan((5,)), arena=HostArena(torch.device("cpu"), 1 << 20))
    assert "forward" in vars(model)
    undo()
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.get_decoder())


def test_a_step_without_backward_gives_its_memory_back() -> None:
    wrapped = build()
    arena = HostArena(torch.device("cpu"), 1 << 24)
    use_engine(wrapped.get_base_model(), lambda tokens: plan((2, 3), place="host"), arena=arena)
    loss = wrapped.get_base_model()(**batch([[30]]), use_cache=False).loss
    held = arena.used_bytes
    del loss
    gc.collect()
    assert held > 0
    assert arena.used_bytes == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_dropout": 0.1}, "dropout"),
        ({"family": "Mistral", "sliding_window": 16}, "sliding window"),
        ({"family": "GPTNeoX"}, "family"),
    ],
)
def test_models_it_would_compute_otherwise_are_refused(changes: dict[str, Any], reason: str) -> None:
    import transformers

    family = changes.pop("family", "Llama")
    sizes = {k: v for k, v in SIZES.items() if family != "GPTNeoX" or "key_value" not in k}
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{family}Config")(**sizes | changes)
    )
    fault = fused_fault(model)
    assert fault is not None
    assert reason in fault


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"lora_dropout": 0.1}])
def test_adapters_it_would_compute_otherwise_are_refused(lora: dict[str, Any]) -> None:
    import transformers
    from peft import LoraConfig, get_peft_model

    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES))
    assert fused_fault(get_peft_model(model, LoraConfig(r=2, target_modules=ALL, **lora)).get_base_model())


def test_nf4_weights_train_with_the_gradients_of_pefts_own_layers() -> None:
    import transformers
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    name = attention_name("auto", torch.device("cpu"))
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**sizes), attn_implementation=name
    )
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for child, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    quantized = Linear4bit(
                        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32,
                        compress_statistics=True, quant_type="nf4",
                    )  # fmt: skip
                    quantized.load_state_dict({"weight": linear.weight.data})
                    setattr(parent, child, quantized.to("cpu"))
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=ALL))
    for parameter_name, parameter in wrapped.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data.normal_(0, 0.2)
    inputs = batch([[20, 10]])
    loss, grads = plain_outcome(wrapped, inputs)
    use_engine(
        wrapped.get_base_model(), lambda tokens: plan((1, 2)), arena=HostArena(torch.device("cpu"), 1 << 24)
    )
    found, found_grads = outcome(wrapped, inputs)
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
    assert found_grads.keys() == grads.keys()
    for parameter_name, grad in grads.items():
        scale = float(grad.abs().max())
        torch.testing.assert_close(found_grads[parameter_name], grad, rtol=0, atol=2e-5 * scale)


RANK = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from test_engine import batch, build, plan
from longlora_cli.memory.arena import HostArena
from longlora_cli.memory.engine import use_engine
dist.init_process_group("gloo")
rank = dist.get_rank()
wrapped = build()
use_engine(wrapped.get_base_model(), lambda tokens: plan((2, 3)), arena=HostArena(torch.device("cpu"), 1 << 24))
ddp = torch.nn.parallel.DistributedDataParallel(wrapped)
inputs = batch([[30], [12, 18]])
mine = {k: v[rank : rank + 1] for k, v in inputs.items()}
count = inputs["labels"][:, 1:].ne(-100).sum()
ddp(**mine, use_cache=False, num_items_in_batch=count / 2).loss.backward()  # DDP takes the mean of two
if rank == 0:
    from safetensors.torch import save_file
    save_file({n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None}, sys.argv[2])
dist.destroy_process_group()
"""


def test_two_processes_under_ddp_get_the_gradients_of_one(tmp_path: Path, server: Server) -> None:
    from safetensors.torch import load_file

    script, out = tmp_path / "rank.py", tmp_path / "grads.safetensors"
    script.write_text(RANK)
    _, err = (child := server.start(Path(__file__).parent, out, script=script, processes=2)).communicate()
    assert child.returncode == 0, err
    wrapped = build()
    use_engine(
        wrapped.get_base_model(), lambda tokens: plan((2, 3)), arena=HostArena(torch.device("cpu"), 1 << 24)
    )
    _, expected = outcome(wrapped, batch([[30], [12, 18]]))
    found = load_file(out)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-10, atol=1e-13)


def test_bf16_under_autocast_stays_in_bf16() -> None:
    wrapped = build(num_hidden_layers=2).to(torch.bfloat16)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in wrapped.modules():
        vars(module).pop("forward", None)
    use_engine(
        wrapped.get_base_model(), lambda tokens: plan((2,)), arena=HostArena(torch.device("cpu"), 1 << 24)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, grads = outcome(wrapped, batch([[12]]))
    assert loss.dtype == torch.float32
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads.values())


def test_shifted_groups_are_for_training_and_full_attention_for_what_is_measured_meanwhile() -> None:
    wrapped = build()
    inputs = {k: v for k, v in batch([[30]]).items() if k != "labels"}
    model = wrapped.get_base_model()
    with torch.no_grad():
        expected = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    full = outcome_with(wrapped, plan((2, 3)))
    shifted = outcome_with(wrapped, plan((2, 3), shifted_group=8))
    assert not torch.allclose(full, shifted, rtol=1e-6)
    use_engine(model, lambda n: plan((2, 3), shifted_group=8), arena=HostArena(torch.device("cpu"), 1 << 20))
    with torch.no_grad():
        found = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def outcome_with(wrapped: Any, chosen: MemoryPlan) -> Tensor:
    """The training loss under a plan."""
    arena = HostArena(torch.device("cpu"), 1 << 24)
    undo = use_engine(wrapped.get_base_model(), lambda tokens: chosen, arena=arena)
    loss, _ = outcome(wrapped, batch([[30]]))
    undo()
    return loss
