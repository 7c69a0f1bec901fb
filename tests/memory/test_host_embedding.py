"""An input embedding on the host gives the rows, losses and gradients that it gave on the GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_engine import batch, build, outcome, plan
from torch import Tensor, nn

from longlora_cli.errors import IncompatibleError
from longlora_cli.memory.arena import HostArena
from longlora_cli.memory.engine import use_engine
from longlora_cli.memory.host_embedding import host_embedding_fault, use_host_embedding

ROW_BYTES = 32 * 8  # of the tiny model in float64
# Halves of one row, of seven, and of more than any batch here.
STAGING = [1, 2 * 7 * ROW_BYTES, 2**20]


@contextlib.contextmanager
def on_host(model: Any, **more: Any) -> Iterator[None]:
    undo = use_host_embedding(model, **more)
    try:
        yield
    finally:
        undo()


@contextlib.contextmanager
def engine(wrapped: Any, device: str = "cpu", **more: Any) -> Iterator[None]:
    """The fused path, by the plain kernel: others may add a gradient in any order, and bits are compared here."""
    chosen = plan((2, 3), **more)
    with HostArena(torch.device(device), 1 << 24) as arena:
        undo = use_engine(wrapped.get_base_model(), lambda tokens: chosen, arena=arena, kernel="math")
        try:
            yield
        finally:
            undo()


def assert_equal(found: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Bit for bit: the same rows enter the same computation."""
    assert torch.equal(found[0], wanted[0])
    assert found[1].keys() == wanted[1].keys()
    assert wanted[1]
    for name, grad in wanted[1].items():
        assert torch.equal(found[1][name], grad), name


@pytest.mark.parametrize("documents", [[[20, 1, 9]], [[1]], [[5, 7], [12]]])
@pytest.mark.parametrize("staging", STAGING)
def test_loss_and_every_gradient_of_the_engine_are_the_same(staging: int, documents: list[list[int]]) -> None:
    wrapped, inputs = build(), batch(documents)
    with engine(wrapped):
        wanted = outcome(wrapped, inputs)
        with on_host(wrapped, staging_bytes=staging):
            assert_equal(outcome(wrapped, inputs), wanted)


def test_loss_and_every_gradient_of_the_models_own_code_are_the_same() -> None:
    wrapped, inputs = build("Qwen2"), batch([[20, 1, 9]])
    wanted = outcome(wrapped, inputs)
    with on_host(wrapped, staging_bytes=STAGING[1]):
        assert_equal(outcome(wrapped, inputs), wanted)


def test_answers_with_a_cache_are_the_same() -> None:
    model = build().eval().get_base_model()
    ids = batch([[30]])["input_ids"]
    more = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    wanted = model.generate(ids, **more)
    with on_host(model, staging_bytes=STAGING[1]):
        found = model.generate(ids, **more)
    assert torch.equal(found.sequences, wanted.sequences)
    assert torch.equal(torch.stack(found.logits), torch.stack(wanted.logits))


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (8,), (2, 15), (3, 1, 5)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_of_any_ids_are_those_of_the_plain_table(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model = build()
    embedding = model.get_input_embeddings()
    ids = torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    wanted = embedding(ids)
    with on_host(model, staging_bytes=STAGING[1]):
        found = embedding(ids)
        again = embedding(ids.flip(0))
    assert torch.equal(found, wanted)  # and the second call has not written over what the first gave
    assert torch.equal(again, wanted.flip(0))


def test_an_id_that_the_table_lacks_is_an_error() -> None:
    model = build()
    with on_host(model), pytest.raises(IndexError):
        model.get_input_embeddings()(torch.tensor([3, 97]))


def test_undo_gives_everything_back_bit_for_bit_and_can_be_called_twice() -> None:
    model = build()
    embedding = model.get_input_embeddings()
    weight, before, own = embedding.weight, embedding.weight.detach().clone(), dict(vars(embedding))
    attributes, class_forward = set(vars(model)), nn.Embedding.forward
    undo = use_host_embedding(model)
    assert vars(embedding) != own
    assert nn.Embedding.forward is class_forward
    undo()
    undo()
    assert vars(embedding) == own
    assert set(vars(model)) == attributes
    assert embedding.weight is weight
    assert torch.equal(weight, before)


def test_state_dicts_have_the_same_names_and_numbers() -> None:
    from peft.utils import get_peft_model_state_dict

    model = build()
    wanted, adapter = model.state_dict(), get_peft_model_state_dict(model, save_embedding_layers=False)
    with on_host(model):
        found, found_adapter = (
            model.state_dict(),
            get_peft_model_state_dict(model, save_embedding_layers=False),
        )
    assert list(found) == list(wanted)
    assert list(found_adapter) == list(adapter)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_moving_the_model_leaves_the_table_on_the_host() -> None:
    model = build()
    before = model.get_input_embeddings().weight.detach().clone()
    with on_host(model):
        model.to("meta")
        weights = dict(model.named_parameters())
        assert torch.equal(model.get_input_embeddings().weight, before)
    meta = [name for name, weight in weights.items() if weight.is_meta]
    assert len(meta) == len(weights) - 1


def test_another_dtype_of_the_model_is_followed() -> None:
    model = build()
    ids = torch.arange(20)
    wanted = model.get_input_embeddings()(ids).float()
    with on_host(model, staging_bytes=STAGING[1]):
        model.float()
        found = model.get_input_embeddings()(ids)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


def test_hooks_on_the_embedding_still_run() -> None:
    model = build()
    embedding = model.get_input_embeddings()
    model.enable_input_require_grads()
    with on_host(model):
        assert embedding(torch.arange(3)).requires_grad


def test_ddp_leaves_the_table_alone() -> None:
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    model = build()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with on_host(model):
            wrapped = DistributedDataParallel(model)
            assert [n for n, p in model.named_parameters() if n in wrapped.parameters_to_ignore] == [
                n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight
            ]
        assert not DistributedDataParallel(model).parameters_to_ignore
    finally:
        distributed.destroy_process_group()


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return 8 * super().forward(input)


def scaled(model: Any) -> None:
    embedding = model.get_base_model().get_input_embeddings()
    embedding.__class__ = Scaled


def trained(model: Any) -> None:
    model.get_input_embeddings().weight.requires_grad_()


def limited(model: Any) -> None:
    model.get_input_embeddings().max_norm = 1.0


def hooked(model: Any) -> None:
    embedding = model.get_input_embeddings()
    embedding.forward = embedding.forward


FAULTS: dict[str, tuple[Any, Any, str]] = {
    "tied": (lambda: build(tie_word_embeddings=True), None, "also its output matrix"),
    "trained by PEFT": (lambda: build(also=["embed_tokens"]), None, "is trained"),
    "trained by itself": (build, trained, "is trained"),
    "scaled": (build, scaled, "more than look rows up"),
    "of limited norm": (build, limited, "more than look rows up"),
    "changed": (build, hooked, "other code"),
    "there already": (build, use_host_embedding, "other code"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_an_embedding_that_cannot_move_is_refused_with_the_reason_and_left_alone(kind: str) -> None:
    make, change, reason = FAULTS[kind]
    model = make()
    if change is not None:
        change(model)
    before = dict(vars(model.get_input_embeddings()))
    with pytest.raises(IncompatibleError, match=reason):
        use_host_embedding(model)
    assert vars(model.get_input_embeddings()) == before


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_the_fused_families_untied_have_an_embedding_that_can_move(family: str) -> None:
    assert host_embedding_fault(build(family, sliding_window=None)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("staging", [1, 2 * 100 * 512 * 4, 2**26])
def test_on_a_gpu_a_step_is_the_same_and_its_memory_smaller_by_the_table(staging: int) -> None:
    wrapped = build(vocab_size=30_000, hidden_size=512, intermediate_size=640, head_dim=128).float().cuda()
    weight = wrapped.get_input_embeddings().weight
    inputs = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in batch([[2000, 1, 999]]).items()}
    with engine(wrapped, "cuda", tile=1024):
        outcome(wrapped, inputs)  # libraries take their own memory at first use
        wanted = outcome(wrapped, inputs)
        wrapped.zero_grad()
        before = torch.cuda.memory_allocated()
        undo = use_host_embedding(wrapped, staging_bytes=staging)
        assert before - torch.cuda.memory_allocated() == weight.nbytes
        wrapped.to("cuda")
        assert weight.device.type == "cpu"
        for _ in range(3):  # a half of the buffer is filled again while the GPU is behind
            torch.randn(4096, 4096, device="cuda").matmul(torch.randn(4096, 4096, device="cuda"))
            assert_equal(outcome(wrapped, inputs), wanted)
        undo()
    assert weight.device.type == "cuda"
    assert_equal_after_undo(wrapped, inputs)


def assert_equal_after_undo(wrapped: Any, inputs: dict[str, Any]) -> None:
    """The table is back on the GPU and in use there."""
    embedding = wrapped.get_input_embeddings()
    rows = nn.functional.embedding(inputs["input_ids"], embedding.weight)
    assert torch.equal(embedding(inputs["input_ids"]), rows)
