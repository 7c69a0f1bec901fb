"""The memory engine around any decoder: loss and every gradient stay the plain model's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Server
from tiny_models import make_tiny_model
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from longlora_cli.errors import IncompatibleError
from longlora_cli.memory.arena import HostArena
from longlora_cli.memory.attention import attention_name
from longlora_cli.memory.generic import decoder_and_layers, use_generic_engine
from longlora_cli.memory.pinned import PAGE_BYTES
from longlora_cli.memory.recompute import Call, GroupPass
from longlora_cli.memory.token_tiles import is_token_wise

CPU = torch.device("cpu")
COMMON = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 4, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma3_text": {
        "sliding_window": 4,
        "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full")],
    },
    "phi3": {},
    "gpt_neox": {"hidden_dropout": 0.0},
    "gpt2": {
        "n_embd": 16, "n_layer": 5, "n_head": 4, "n_positions": 64,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    input: str


@dataclass(frozen=True)
class Plan:
    layers: tuple[Layer, ...]
    tile_tokens: int = 0
    inner_input: str = "host"


def plan(
    places: str = "host", *, group: int = 1, tile: int = 0, inner: str = "host", layers: int = 5
) -> Plan:
    """Groups of `group` layers, the last one shorter where it does not divide; places in turn."""
    names = places.split()
    choices = [names[i // group % len(names)] if i % group == 0 else "recompute" for i in range(layers)]
    return Plan(tuple(map(Layer, choices)), tile, inner)


def make(family: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    settings = COMMON | FAMILIES.get(family, {}) | changes
    attention, experts = settings.pop("attention", "eager"), settings.pop("experts", None)
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, **({"experts_implementation": experts} if experts else {})
    )
    with torch.no_grad():
        for p in model.parameters():  # biases and norms too: none is at a special value
            p.add_(torch.randn_like(p) * 0.05)
    return model.double().train()


def batch(rows: int = 2, tokens: int = 13, seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 60, (rows, tokens), generator=generator)
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def step(model: nn.Module, inputs: dict[str, Any], seed: int = 2) -> dict[str, Tensor]:
    """Loss and every gradient by name."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = model(**inputs).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "next random number": torch.rand(1), **grads}


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[HostArena]:
    with HostArena(CPU, 1 << 20, disk=tmp_path, disk_bytes=1 << 20) as made:
        yield made
        assert (made.used_bytes, made.disk_used_bytes) == (0, 0)


def check(
    model: nn.Module,
    chosen: Plan,
    arena: HostArena,
    inputs: dict[str, Any] | None = None,
    rtol: float = 1e-10,
) -> None:
    inputs = inputs or batch()
    wanted = step(model, inputs)
    undo = use_generic_engine(model, chosen, arena)
    for _ in range(2):
        actual = step(model, inputs)
        assert len(wanted) > 10
        assert wanted.keys() == actual.keys()
        torch.testing.assert_close(actual, wanted, rtol=rtol, atol=rtol * 1e-3)
    undo()


@pytest.mark.parametrize("tile", [0, 5])
@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_keeps_its_loss_and_gradients(
    family: str, group: int, tile: int, arena: HostArena
) -> None:
    check(make(family), plan(group=group, tile=tile), arena)


@pytest.mark.parametrize("inner", ["gpu", "host", "disk"])
@pytest.mark.parametrize("places", ["gpu", "host", "disk", "disk gpu host"])
def test_every_place_keeps_loss_and_gradients(places: str, inner: str, arena: HostArena) -> None:
    check(make(), plan(places, group=2, inner=inner), arena)


@pytest.mark.parametrize("tile", [1, 7, 13, 25, 26, 100])
def test_tiles_of_any_size_keep_loss_and_gradients(tile: int, arena: HostArena) -> None:
    check(make(), plan(tile=tile), arena)


def test_one_token_rows_keep_loss_and_gradients(arena: HostArena) -> None:
    check(make(), plan(group=3, tile=1), arena, batch(rows=3, tokens=2))


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_packed_documents_keep_loss_and_gradients(family: str, arena: HostArena) -> None:
    model = make(family, attention=attention_name("auto", CPU))
    lengths = [[1, 8, 4], [13]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    inputs = batch() | {"document_lengths": lengths, "position_ids": positions}
    apart = step(model, inputs)["loss"]
    assert apart != step(model, batch())["loss"]
    check(model, plan(group=2, tile=6), arena, inputs)


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize(
    ("family", "rates"),
    [
        ("llama", {"attention_dropout": 0.3}),
        ("gpt2", {"attn_pdrop": 0.2, "resid_pdrop": 0.3, "embd_pdrop": 0.1}),
        ("gpt_neox", {"attention_dropout": 0.2, "hidden_dropout": 0.3}),
    ],
)
def test_dropout_draws_the_same_numbers_again(
    family: str, rates: dict[str, float], group: int, arena: HostArena
) -> None:
    model = make(family, **rates)
    assert step(model, batch(), seed=2)["loss"] != step(model, batch(), seed=3)["loss"]
    check(model, plan(group=group, inner="disk"), arena)


def test_dropout_inside_tiles_is_the_same_forward_and_backward(arena: HostArena) -> None:
    model = make("gpt2", resid_pdrop=0.3)

    def plain_tiles(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.cat([run(t) for t in x.reshape(1, -1, 16).split(5, 1)], 1).view(x.shape)

    blocks = model.transformer.h
    for block in blocks:
        block.mlp.forward = plain_tiles(block.mlp.forward)
    wanted = step(model, batch())
    for block in blocks:
        del block.mlp.forward
    use_generic_engine(model, plan(tile=5, group=2), arena)
    torch.testing.assert_close(step(model, batch()), wanted, rtol=1e-10, atol=1e-13)


def lora(model: Any, **changes: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | changes
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).train()


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"modules_to_save": ["input_layernorm", "post_attention_layernorm", "norm"]},
        {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
        {"use_dora": True},
        {"target_modules": ["up_proj"], "layers_to_transform": [3]},
    ],
    ids=["lora", "norms", "embeddings", "dora", "one-layer"],
)
def test_adapters_keep_loss_and_gradients(changes: dict[str, Any], group: int, arena: HostArena) -> None:
    model = lora(make(tie_word_embeddings=False), **changes).double()
    count = sum(p.requires_grad for p in model.parameters())
    chosen = plan(group=group, tile=7)
    inputs = batch()
    wanted = step(model, inputs)
    assert len(wanted) == count + 2
    use_generic_engine(model, chosen, arena)
    torch.testing.assert_close(step(model, inputs), wanted, rtol=1e-10, atol=1e-13)


def test_an_adapters_dropout_draws_the_same_numbers_again(arena: HostArena) -> None:
    model = lora(make(), lora_dropout=0.4).double()
    check(model, plan(group=2), arena)


def quantized(folder: Path, tokenizer: Path, **settings: Any) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    made = make_tiny_model(folder / "m", tokenizer, num_hidden_layers=3)
    config = BitsAndBytesConfig(**settings)
    return AutoModelForCausalLM.from_pretrained(made, quantization_config=config, dtype=torch.float32)


@pytest.mark.parametrize("group", [1, 2])
def test_nf4_weights_keep_loss_and_gradients(
    tmp_path: Path, tiny_tokenizer_folder: Path, group: int, arena: HostArena
) -> None:
    base = quantized(
        tmp_path, tiny_tokenizer_folder, load_in_4bit=True, bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = lora(base, modules_to_save=["input_layernorm", "norm"])
    check(model, plan(group=group, tile=7, layers=3), arena, rtol=2e-5)


@pytest.mark.filterwarnings("ignore:.*inputs will be cast.*")
def test_int8_weights_keep_loss_and_gradients_and_no_activations(
    tmp_path: Path, tiny_tokenizer_folder: Path, arena: HostArena
) -> None:
    model = lora(quantized(tmp_path, tiny_tokenizer_folder, load_in_8bit=True))
    check(model, plan(group=2, layers=3), arena, rtol=2e-5)
    use_generic_engine(model, plan(layers=3), arena)
    assert alive_after_forward(model) == []


def alive_after_forward(model: nn.Module) -> list[str]:
    """Modules in decoder layers whose output still exists when a training forward pass is over."""
    outputs: dict[str, StorageWeakRef] = {}
    hooks = []
    last = f"layers.{len(decoder_and_layers(model)[1]) - 1}"
    for name, module in model.named_modules():
        if ".layers." not in name or name.endswith(last):  # the last layer's output is the norm's input
            continue

        def keep(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            tensor = output if isinstance(output, Tensor) else output[0]
            outputs[name] = StorageWeakRef(tensor.untyped_storage())

        hooks.append(module.register_forward_hook(keep))
    loss = model(**batch()).loss
    alive = [n for n, storage in outputs.items() if not storage.expired()]
    for hook in hooks:
        hook.remove()
    loss.backward()
    assert len(outputs) > 20
    return alive


@pytest.mark.parametrize("group", [1, 3])
def test_no_activation_inside_a_layer_outlives_the_forward_pass(group: int, arena: HostArena) -> None:
    model = make(num_hidden_layers=6)
    assert alive_after_forward(model) != []
    use_generic_engine(model, plan(group=group, layers=6), arena)
    assert alive_after_forward(model) == []


@pytest.mark.parametrize("tile", [0, 5])
def test_nothing_computed_again_outlives_the_backward_pass(tile: int, arena: HostArena) -> None:
    model = make()
    use_generic_engine(model, plan(group=2, tile=tile), arena)
    loss = model(**batch()).loss
    made: list[StorageWeakRef] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        tensor = output if isinstance(output, Tensor) else output[0]
        made.append(StorageWeakRef(tensor.untyped_storage()))

    for layer in model.model.layers:
        for module in layer.modules():
            module.register_forward_hook(keep)
    loss.backward()
    assert len(made) > 50
    assert all(storage.expired() for storage in made)


def test_what_backward_does_not_need_is_not_kept_when_a_layer_runs_again(arena: HostArena) -> None:
    unused: list[StorageWeakRef] = []
    expired: list[bool] = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            assert len(ctx.saved_tensors) == 1  # runs the layer again
            expired.append(unused[-1].expired())
            return grad * 2

    def layer(hidden: Tensor) -> Tensor:
        unused.append(
            StorageWeakRef(hidden.exp().untyped_storage())
        )  # exp saves its output, and nothing asks for it
        return Look.apply(hidden)

    x = torch.ones(3, requires_grad=True)
    out = GroupPass([Call(layer, (), {})], arena, "host", "host").forward(x * 1)
    out.sum().backward()
    assert (len(unused), expired) == (2, [True])


@pytest.mark.parametrize(
    ("group", "inner", "pages"),
    [(1, "host", 6), (2, "host", 3), (3, "host", 3), (3, "gpu", 2), (6, "host", 5)],
)
def test_as_many_states_wait_on_the_host_as_the_plan_says(
    group: int, inner: str, pages: int, arena: HostArena
) -> None:
    model = make(num_hidden_layers=6)
    use_generic_engine(model, plan(group=group, layers=6, inner=inner), arena)
    loss = model(**batch(rows=1, tokens=PAGE_BYTES // (16 * 8))).loss
    assert arena.used_bytes == -(-6 // group) * PAGE_BYTES
    loss.backward()
    assert arena.peak_bytes == pages * PAGE_BYTES


def test_a_model_that_does_not_say_what_its_layers_return_keeps_one_more_state_once(arena: HostArena) -> None:
    model = make("gpt_neox", num_hidden_layers=6)
    use_generic_engine(model, plan(group=3, layers=6), arena)
    for pages in (3, 2):
        loss = model(**batch(rows=1, tokens=PAGE_BYTES // (16 * 8))).loss
        assert arena.used_bytes == pages * PAGE_BYTES
        loss.backward()


def test_layers_run_as_often_as_they_must(arena: HostArena) -> None:
    model = make(num_hidden_layers=6)
    counts = {"attention": 0, "mlp tokens": 0}

    def count_attention(*_: Any) -> None:
        counts["attention"] += 1

    def count_mlp(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        counts["mlp tokens"] += inputs[0].shape[:-1].numel()

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(count_attention)
        layer.mlp.down_proj.register_forward_pre_hook(count_mlp)
    for group, attention, mlp in ((1, 2 * 6, 2 * 6), (3, 6 + 2 * 2 + 6, 2 * 6 + 2 * 2)):
        undo = use_generic_engine(model, plan(group=group, layers=6, tile=4), arena)
        counts |= {"attention": 0, "mlp tokens": 0}
        step(model, batch())
        assert counts == {"attention": attention, "mlp tokens": mlp * 26}
        undo()


def test_a_pass_without_backward_gives_its_memory_back(arena: HostArena) -> None:
    model = make()
    use_generic_engine(model, plan("host disk", group=2), arena)
    loss = model(**batch()).loss
    assert arena.used_bytes > 0
    assert arena.disk_used_bytes > 0
    del loss
    assert (arena.used_bytes, arena.disk_used_bytes) == (0, 0)


def test_an_error_in_the_middle_gives_memory_back_and_the_next_step_is_right(arena: HostArena) -> None:
    model = make()
    wanted = step(model, batch())
    use_generic_engine(model, plan(group=2, tile=5), arena)

    def fail(*_: Any) -> None:
        raise KeyError("on purpose")

    for part in (
        model.model.layers[0],
        model.model.layers[1],
        model.model.layers[3].self_attn,
        model.model.norm,
    ):
        hook = part.register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            model(**batch())
        hook.remove()
        assert arena.used_bytes == 0
        torch.testing.assert_close(step(model, batch()), wanted, rtol=1e-10, atol=1e-13)
    loss = model(**batch()).loss
    hook = model.model.layers[2].self_attn.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        loss.backward()
    hook.remove()
    del loss
    torch.testing.assert_close(step(model, batch()), wanted, rtol=1e-10, atol=1e-13)


def test_two_passes_before_their_backwards_keep_apart(arena: HostArena) -> None:
    model = make()
    inputs = [batch(seed=5), batch(seed=6, tokens=9)]

    def both() -> list[Tensor]:
        model.zero_grad()
        losses = [model(**i).loss for i in inputs]
        for loss in losses:
            loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    wanted = both()
    use_generic_engine(model, plan(group=2, tile=5), arena)
    torch.testing.assert_close(both(), wanted, rtol=1e-10, atol=1e-13)


def test_a_second_backward_is_refused_not_wrong(arena: HostArena) -> None:
    model = make()
    use_generic_engine(model, plan(), arena)
    loss = model(**batch()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="retain_graph has no effect"):
        loss.backward()


def test_autocast_computes_the_same_again(arena: HostArena) -> None:
    model = make().float()
    inputs = batch(rows=1, tokens=6)

    def run() -> dict[str, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = step(model, inputs)  # the backward too is inside
            torch.manual_seed(2)
            loss = model(**inputs).loss
        model.zero_grad()
        loss.backward()  # and outside
        return result | {f"outside {n}": p.grad.clone() for n, p in model.named_parameters()}

    wanted = run()
    use_generic_engine(model, plan(group=2), arena)
    torch.testing.assert_close(run(), wanted, rtol=0, atol=0)


def test_tiles_under_autocast_are_within_bfloat16s_rounding(arena: HostArena) -> None:
    model = make().float()
    inputs = batch(rows=1, tokens=6)

    def run() -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    wanted = run()
    use_generic_engine(model, plan(tile=4), arena)
    for a, w in zip(run(), wanted, strict=True):
        assert (a - w).norm() < 0.01 * w.norm()


def test_weights_that_tiles_have_cast_still_get_gradients_in_the_same_autocast(arena: HostArena) -> None:
    model = make().float()
    inputs = [batch(rows=1, tokens=6), batch(rows=1, tokens=4)]

    def run() -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**inputs[0]).loss.detach()
            loss = model(**inputs[1]).loss  # no more tokens than a tile
        loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    wanted = run()
    use_generic_engine(model, plan(tile=4), arena)
    torch.testing.assert_close(run(), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("aux", [False, True])
def test_experts_are_left_whole_and_their_balancing_loss_reaches_the_router(
    aux: bool, arena: HostArena
) -> None:
    # the default kernel knows no float64
    changes = {
        "experts": "eager",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "output_router_logits": aux,
        "router_aux_loss_coef": 1.0,
    }
    model = make("mixtral", **changes)
    undo = use_generic_engine(model, plan(tile=5), arena)
    assert all("forward" not in layer.mlp.__dict__ for layer in model.model.layers)
    undo()
    check(model, plan(group=2, tile=5), arena)


class Mixer(nn.Module):
    def __init__(self, result: str) -> None:
        super().__init__()
        self.proj = nn.Linear(16, 8 if result == "narrow" else 16)
        self.result = result

    def forward(self, hidden: Tensor) -> Any:
        out = self.proj(hidden)
        if self.result == "mixed":
            out = out + hidden.mean(1, keepdim=True)
        if self.result == "random":
            out = nn.functional.dropout(out, 0.5)
        return (out, None) if self.result == "tuple" else out


@pytest.mark.parametrize(
    ("result", "fits"),
    [("plain", True), ("random", True), ("mixed", False), ("tuple", False), ("narrow", False)],
)
def test_only_modules_that_treat_each_token_alone_are_tiled(result: str, fits: bool) -> None:
    mixer = Mixer(result)
    state = torch.get_rng_state()
    assert is_token_wise(mixer, 16, torch.float32) == fits
    assert torch.equal(torch.get_rng_state(), state)
    assert not is_token_wise(mixer, 12, torch.float32)  # another width than its own


class InTuple(nn.Module):
    """A layer as older models have them: the hidden state comes first in a tuple."""

    def __init__(self, layer: nn.Module, extra: bool) -> None:
        super().__init__()
        self.layer, self.extra = layer, extra

    def forward(self, hidden: Tensor, **kwargs: Any) -> tuple[Any, ...]:
        out = self.layer(hidden, **kwargs)
        return (out, out.sum()) if self.extra else (out,)


def tuple_model(extra: bool = False) -> Any:
    model = make(attention_dropout=0.2)
    model.model.layers = nn.ModuleList(InTuple(layer, extra) for layer in model.model.layers)
    decoder = model.model
    inner = decoder.rotary_emb

    def forward(input_ids: Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        hidden = decoder.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1])[None]
        for layer in decoder.layers:
            hidden = layer(hidden, position_embeddings=inner(hidden, positions))[0]
        return BaseModelOutputWithPast(last_hidden_state=decoder.norm(hidden))

    decoder.forward = forward
    return model


@pytest.mark.parametrize("group", [1, 2, 5])
def test_layers_that_return_tuples_keep_loss_and_gradients(group: int, arena: HostArena) -> None:
    check(tuple_model(), plan(group=group), arena)


def test_layers_that_return_more_than_the_hidden_state_are_refused_in_groups(arena: HostArena) -> None:
    use_generic_engine(tuple_model(extra=True), plan(group=2), arena)
    check(tuple_model(extra=True), plan(group=1), arena)
    model = tuple_model(extra=True)
    use_generic_engine(model, plan(group=2), arena)
    with pytest.raises(IncompatibleError, match="return more than the hidden state"):
        model(**batch())


def test_a_model_that_works_between_its_layers_is_refused_in_groups(arena: HostArena) -> None:
    model = make()
    use_generic_engine(model, plan(group=2), arena)
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 1.0, *args[1:]))
    with pytest.raises(
        IncompatibleError, match="something changes the hidden state between a group's layers"
    ):
        model(**batch())


@pytest.mark.parametrize("skipped", [1, 3, 4])
def test_a_model_that_skips_a_layer_of_a_group_is_refused(skipped: int, arena: HostArena) -> None:
    model = make()
    use_generic_engine(model, plan(group=5 if skipped == 4 else 2), arena)
    layers = list(model.model.layers)
    model.model.layers = nn.ModuleList(layers[:skipped] + layers[skipped + 1 :])
    model.config.num_hidden_layers = 4
    with pytest.raises(IncompatibleError, match="cannot be trained in groups of layers"):
        model(**batch())


def test_layers_whose_parameters_are_gathered_one_by_one_are_refused_in_groups(arena: HostArena) -> None:
    model = make()
    next(model.model.layers[0].parameters()).ds_id = 0
    use_generic_engine(model, plan(group=2), arena)
    with pytest.raises(IncompatibleError, match="sharded over processes"):
        model(**batch())


@pytest.mark.parametrize("chosen", [plan(layers=4), Plan((Layer("recompute"), *[Layer("host")] * 4))])
def test_a_plan_that_does_not_fit_the_model_is_refused(chosen: Plan, arena: HostArena) -> None:
    with pytest.raises(IncompatibleError, match="a memory plan for"):
        use_generic_engine(make(), chosen, arena)


def test_the_models_own_checkpointing_is_refused(arena: HostArena) -> None:
    model = make()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(IncompatibleError, match="own gradient checkpointing is on"):
        use_generic_engine(model, plan(), arena)


def test_evaluation_and_generation_never_touch_the_arena(arena: HostArena) -> None:
    model = make()
    inputs = batch()
    ids = inputs["input_ids"]
    plain = model.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    loss = model(**inputs).loss
    use_generic_engine(model, plan(group=2, tile=3), arena)
    assert torch.equal(model(**inputs).loss, loss)
    model.train()
    with torch.no_grad():
        assert torch.equal(model(**inputs).loss, loss)
    model.eval()
    again = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert torch.equal(again, plain)
    assert arena.peak_bytes == 0


def test_a_cache_in_training_goes_past_the_engine_with_one_warning(
    arena: HostArena, caplog: pytest.LogCaptureFixture
) -> None:
    model = make()
    use_generic_engine(model, plan(group=2), arena)
    for _ in range(2):
        out = model(**batch() | {"use_cache": True})
        assert out.past_key_values.get_seq_length() == 13
    assert arena.peak_bytes == 0
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "use_cache=False" in caplog.text


def test_undo_leaves_the_model_as_it_was(arena: HostArena) -> None:
    model = make()
    own = model.model.layers[2].forward
    model.model.layers[2].forward = own

    def state() -> list[Any]:
        return [(n, sorted(m.__dict__), len(m._forward_hooks)) for n, m in model.named_modules()]

    before = state()
    undo = use_generic_engine(model, plan(group=2, tile=5), arena)
    assert state() != before
    undo()
    undo()
    assert state() == before
    assert model.model.layers[2].forward is own
    step(model, batch())
    assert arena.peak_bytes == 0


def test_one_line_says_what_was_wrapped(arena: HostArena, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "longlora"):
        use_generic_engine(make(), plan("host gpu", group=2, tile=5), arena)
    assert [r.getMessage() for r in caplog.records] == [
        "memory engine (generic): 5 layers in 3 groups, inputs 1 on gpu, 2 on host; 5 MLPs in tiles of 5 tokens"
    ]


TWO = """
import sys, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
sys.path[:0] = sys.argv[3:]
from test_generic import CPU, batch, lora, make, plan
from longlora_cli.memory.arena import HostArena
from longlora_cli.memory.generic import use_generic_engine
dist.init_process_group("gloo")
rank, kind = dist.get_rank(), sys.argv[2]
model = lora(make(), modules_to_save=["norm"]).double() if kind == "ddp" else make()
mine = {k: v[2 * rank : 2 * rank + 2] if isinstance(v, torch.Tensor) else v for k, v in batch(rows=4).items()}
with HostArena(CPU, 1 << 20) as arena:
    use_generic_engine(model, plan(group=2 if kind == "ddp" else 1, tile=5), arena)
    parallel = DistributedDataParallel(model) if kind == "ddp" else model
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (2,))
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh)
    for _ in range(2):
        model.zero_grad()
        parallel(**mine).loss.backward()
    assert arena.peak_bytes > 0
grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
if kind == "fsdp":
    grads = {n: g.full_tensor() for n, g in grads.items()}
from safetensors.torch import save_file
save_file({n: g.contiguous() for n, g in grads.items()}, f"{sys.argv[1]}/rank{rank}.safetensors")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_equal_one_plain_process(tmp_path: Path, server: Server, kind: str) -> None:
    from safetensors.torch import load_file

    script = tmp_path / "two.py"
    script.write_text(TWO)
    here = Path(__file__).parent
    child = server.start(tmp_path, kind, here, here.parent, script=script, processes=2)
    _, err = child.communicate()
    assert child.returncode == 0, err
    model = lora(make(), modules_to_save=["norm"]).double() if kind == "ddp" else make()
    wanted = step(model, batch(rows=4))
    wanted = {n: g for n, g in wanted.items() if n not in ("loss", "next random number")}
    for rank in (0, 1):
        actual = load_file(tmp_path / f"rank{rank}.safetensors")
        assert actual.keys() == wanted.keys()
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.gpu
@pytest.mark.parametrize("places", ["host", "host gpu disk"])
def test_on_a_gpu_many_steps_equal_the_plain_model(tmp_path: Path, places: str) -> None:
    gpu = torch.device("cuda")
    model = make(hidden_size=512, intermediate_size=1024, head_dim=128, attention="sdpa").float().to(gpu)
    size = 2 * 4096 * 512 * 4
    with HostArena(gpu, 6 * size, disk=tmp_path, disk_bytes=6 * size) as arena:
        for seed in range(6):
            inputs = batch(tokens=4096, seed=seed)
            inputs = {k: v.to(gpu) if isinstance(v, Tensor) else v for k, v in inputs.items()}
            wanted = step(model, inputs)
            undo = use_generic_engine(model, plan(places, group=2, tile=1024), arena)
            actual = step(model, inputs)
            undo()
            for name, value in wanted.items():
                assert (actual[name] - value).norm() <= 1e-4 * value.norm() + 1e-9, name
