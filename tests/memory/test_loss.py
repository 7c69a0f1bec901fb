"""Tiles change neither the loss nor any gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longlora_cli.memory import loss as losses_module
from longlora_cli.memory.loss import (
    IGNORE,
    plain_loss,
    scale_in_place,
    tiled_loss,
    token_losses,
    use_tiled_loss,
)


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 5, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    head = torch.randn(11, 5, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.tensor([3, IGNORE, 0, 10, IGNORE, 7, 7, 1, IGNORE])
    return hidden, head, labels


def value_and_gradients(loss: Any, tensors: tuple[Tensor, Tensor, Tensor], **options: Any) -> list[Tensor]:
    total, count = loss(*tensors, **options)
    assert count == 6
    return [total.detach(), *torch.autograd.grad(total * 0.25, tensors[:2])]


@pytest.mark.parametrize("tile_tokens", [1, 4, 6, 100])  # one row, uneven, exact, larger than the input
def test_tiles_change_neither_the_loss_nor_any_gradient(tile_tokens: int) -> None:
    wanted = value_and_gradients(plain_loss, problem())
    actual = value_and_gradients(tiled_loss, problem(), tile_tokens=tile_tokens)
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-14)


def test_in_bf16_the_tiled_gradient_is_no_further_from_exact_than_the_plain_one() -> None:
    exact = value_and_gradients(plain_loss, problem())[1]
    plain = value_and_gradients(plain_loss, problem(torch.bfloat16))[1]
    tiled = value_and_gradients(tiled_loss, problem(torch.bfloat16), tile_tokens=4)[1]
    assert (tiled - exact).norm() <= (plain - exact).norm() * 1.05


def test_only_masked_labels_give_zero_loss_and_zero_gradient() -> None:
    hidden, head, labels = problem()
    total, count = tiled_loss(hidden, head, torch.full_like(labels, IGNORE), tile_tokens=4)
    (gradient,) = torch.autograd.grad(total, hidden)
    assert total == 0
    assert count == 0
    assert torch.equal(gradient, torch.zeros_like(hidden))


def test_no_tile_smaller_than_one_token() -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        tiled_loss(*problem(), tile_tokens=0)


def test_losses_of_single_tokens_add_up_to_the_sum() -> None:
    hidden, head, labels = problem()
    losses = token_losses(hidden, head, labels, tile_tokens=4)
    torch.testing.assert_close(losses.sum(), plain_loss(hidden, head, labels)[0].detach())
    assert torch.equal(losses[labels == IGNORE], torch.zeros(3, dtype=losses.dtype))


def test_a_models_own_loss_is_kept_and_given_back(tiny_model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder).double()
    ids = torch.randint(0, 512, (2, 17), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :5] = IGNORE
    own = model(input_ids=ids, labels=labels).loss
    own.backward()
    wanted = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    undo = use_tiled_loss(model, tile_tokens=5)
    tiled = model(input_ids=ids, labels=labels)
    tiled.loss.backward()
    # transformers takes its logits to float32 before the loss; float64 here agrees to that rounding.
    torch.testing.assert_close(tiled.loss, own.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.grad, wanted, rtol=1e-4, atol=1e-8)
    assert tiled.logits is None
    undo()
    assert model(input_ids=ids, labels=labels).logits is not None


def test_a_model_that_caps_its_logits_keeps_its_own_loss(tiny_model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    model.config.final_logit_softcapping = 30.0
    use_tiled_loss(model, tile_tokens=5)
    ids = torch.arange(8)[None]
    assert model(input_ids=ids, labels=ids).logits is not None


class NewStorages(TorchDispatchMode):
    """Counts the storages of at least `nbytes` that operations make."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self.nbytes, self.made = nbytes, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        old = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage.data_ptr() not in old and storage.nbytes() >= self.nbytes:
                self.made.append(str(func))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_trained_heads_gradient_exists_once_from_forward_to_leaf(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, 8, generator=generator, dtype=dtype, requires_grad=True)
    head = torch.randn(400, 8, generator=generator, dtype=dtype, requires_grad=True)
    labels = torch.randint(400, (12,), generator=generator)
    with NewStorages(head.nbytes) as storages:  # a tile's logits are smaller: 4 x 400 values
        total, _ = tiled_loss(hidden, head, labels, tile_tokens=4)
        (total / 12).backward()
    assert len(storages.made) == 1, storages.made
    assert head.grad is not None


def test_a_float32_heads_gradient_under_16_bit_states_is_made_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(losses_module, "_HEAD_ROWS", 64)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, 8, generator=generator).bfloat16().requires_grad_()
    head = torch.randn(400, 8, generator=generator).requires_grad_()
    labels = torch.randint(400, (12,), generator=generator)
    with NewStorages(400 * 8 * 2) as storages:  # a whole 16-bit product would count
        total, _ = tiled_loss(hidden, head, labels, tile_tokens=3)
        total.backward()
    # The head in 16 bits, and its gradient in float32; nothing a tile.
    assert len([name for name in storages.made if "detach" not in name]) == 2, storages.made
    wanted = head.detach().bfloat16().float().requires_grad_()
    plain_loss(hidden.detach().float(), wanted, labels)[0].backward()
    torch.testing.assert_close(head.grad, wanted.grad, rtol=0.02, atol=0.02)


def test_a_second_backward_is_refused_and_not_scaled_twice() -> None:
    hidden, head, labels = problem()
    total, _ = tiled_loss(hidden, head, labels, tile_tokens=4)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_a_tied_embedding_gets_the_gradient_of_both_its_uses(tiny_model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder).double()
    ids = torch.randint(0, 512, (1, 17), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    wanted = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    use_tiled_loss(model, tile_tokens=5)
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model.lm_head.weight.grad, wanted, rtol=1e-4, atol=1e-8)


def test_the_factor_of_a_16_bit_gradient_is_not_rounded_to_16_bits() -> None:
    values, factor = torch.full((3, 4), 1.0, dtype=torch.bfloat16), torch.tensor(1 / 300)
    scale_in_place(values, factor)
    exact = torch.tensor(1 / 300).to(torch.bfloat16)
    assert torch.equal(values, exact.expand(3, 4))
    values = torch.full((3, 4), 3.0, dtype=torch.bfloat16)
    scale_in_place(values, factor)
    assert torch.equal(values, torch.tensor(3 / 300).to(torch.bfloat16).expand(3, 4))
