"""Send tokens through a module a tile at a time, forward and backward.

An MLP's intermediates are 3 to 4 times as wide as the hidden state; for all tokens at once they are the largest thing
in a layer (7 tensors of 14,336 numbers a token in Llama-3.1-8B: 196 KiB in bf16). A tile of 4,096 tokens is as fast
on a GPU and takes 0.8 GiB whatever the context. Idea: Luo et al. 2024, Mini-Sequence Transformer (arXiv:2407.15892);
Bekman et al. 2025, Arctic Long Sequence Training (arXiv:2506.13996).

The input is saved before the module runs, by a node of its own. So a checkpoint around the layer that runs it again
finds what it needs before the module, and stops there: the module's forward runs twice in all, not three times. The
plain twin is the module itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from longlora_cli.memory.recompute import Ambient

# Mixture-of-experts blocks by class name. Their routers are read by hooks for the balancing loss, once a layer, and
# some of them limit how many tokens an expert takes; both see all tokens or something else.
_ROUTING = ("moe", "expert", "router", "sparse", "switch")


class _Box:
    """Takes the output's gradient past autograd, which would cast it to the input's dtype on the way."""

    grad: Tensor | None = None


class _Keep(torch.autograd.Function):
    """Identity in forward, saving the input; in backward all of the module's backward, tile by tile."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        run: Callable[[Tensor], Tensor],
        tile_tokens: int,
        box: _Box,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.run, ctx.tile_tokens, ctx.box, ctx.parameters = run, tile_tokens, box, parameters
        ctx.ambient = Ambient.now(hidden.device)
        return hidden.view_as(hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        (hidden,) = ctx.saved_tensors
        grad = ctx.box.grad
        ctx.box.grad = None
        needs_hidden = ctx.needs_input_grad[0]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        sums: list[Tensor | None] = [None] * len(ctx.parameters)
        start = 0
        with ctx.ambient.again():
            for x, slope in zip(
                hidden.split(ctx.tile_tokens, 1), grad.split(ctx.tile_tokens, 1), strict=True
            ):
                x = x.detach().requires_grad_(needs_hidden)
                inputs = ([x] if needs_hidden else []) + list(ctx.parameters)
                with torch.enable_grad():
                    y = ctx.run(x)
                grads = list(torch.autograd.grad(y, inputs, slope.to(y.dtype), allow_unused=True))
                del y
                if grad_hidden is not None:
                    grad_hidden[:, start : start + x.shape[1]] = grads.pop(0)
                start += x.shape[1]
                sums = [_added(s, g) for s, g in zip(sums, grads, strict=True)]
        rounded = (None if s is None else s.to(p.dtype) for s, p in zip(sums, ctx.parameters, strict=True))
        return grad_hidden, None, None, None, *rounded


def _added(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """Sums of many tiles are kept in float32 at least."""
    if grad is None:
        return total
    if total is None:
        return grad.float() if grad.dtype in (torch.bfloat16, torch.float16) else grad.clone()
    return total.add_(grad)


class _Run(torch.autograd.Function):
    """The module's forward, tile by tile, without a graph; its backward hands the gradient to `_Keep`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, run: Callable[[Tensor], Tensor], tile_tokens: int, box: _Box
    ) -> Tensor:
        ctx.box = box
        output = None
        start = 0
        caching = torch.is_autocast_cache_enabled()
        # Casts cached here have no graph; torch before 2.13 may reuse them where one is needed.
        torch.set_autocast_cache_enabled(False)
        try:
            for x in hidden.split(tile_tokens, 1):
                y = run(x)
                if output is None:
                    output = y.new_empty(hidden.shape)
                output[:, start : start + x.shape[1]] = y
                start += x.shape[1]
        finally:
            torch.set_autocast_cache_enabled(caching)
        assert output is not None  # there is at least one tile
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.box.grad = grad
        return grad, None, None, None


def in_tiles(
    run: Callable[[Tensor], Tensor], hidden: Tensor, parameters: list[nn.Parameter], tile_tokens: int
) -> Tensor:
    """`run(hidden)`, never for more than `tile_tokens` tokens at once, in forward and in backward.

    Args:
        run: Maps `[1, tokens, width]` to the same shape, each token by itself.
        hidden: `[batch, tokens, width]`.
        parameters: Those that `run` uses and that are trained; their gradients are summed over tiles.
        tile_tokens: At least 1.
    """
    box = _Box()
    flat = hidden.reshape(1, -1, hidden.shape[-1])
    kept = _Keep.apply(flat, run, tile_tokens, box, *parameters)
    output: Tensor = _Run.apply(kept, run, tile_tokens, box)
    return output.view(hidden.shape)


def use_tiles(module: nn.Module, tile_tokens: int) -> Callable[[], None]:
    """Let one module instance, say a layer's `mlp`, compute in tiles while it trains.

    Without gradients, in evaluation, or for no more tokens than a tile it runs as before. Modules of int8 weights that
    keep outliers apart (LLM.int8) choose the outlier columns among the tokens they see together, so theirs is another
    rounding in tiles.

    Returns:
        A function that undoes it.
    """
    run = module.forward

    @functools.wraps(run)
    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        training = module.training and torch.is_grad_enabled() and not args and not kwargs
        if not training or hidden.dim() < 2 or hidden.numel() <= tile_tokens * hidden.shape[-1]:
            return run(hidden, *args, **kwargs)
        parameters = [p for p in module.parameters() if p.requires_grad]
        if not hidden.requires_grad and not parameters:
            return run(hidden)
        return in_tiles(run, hidden, parameters, tile_tokens)

    return replace_forward(module, forward)


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Give one instance another `forward`; returns what puts back the one it had, its own or its class's."""
    had = module.__dict__.get("forward")
    module.forward = forward

    def undo() -> None:
        if had is None:
            del module.forward
        else:
            module.forward = had

    return undo


def is_token_wise(module: nn.Module, width: int, dtype: torch.dtype) -> bool:
    """Whether a module maps each token by itself to one of the same width, so that tiles compute the same.

    Known kinds of routing are refused by name. Then three tokens are sent through twice, with the same random state
    and without gradients: the output must be one tensor of the input's shape, and a change of the last token must not
    reach the others.

    Args:
        module: Say a decoder layer's `mlp`; it is left as it was, and so is the random state.
        width: Of the hidden state.
        dtype: Of the hidden state, for a module whose weights are all quantized.
    """
    names = {type(m).__name__.lower() for m in module.modules()} | {
        n.lower() for n, _ in module.named_modules()
    }
    if any(word in name for name in names for word in _ROUTING):
        return False
    weights = list(module.parameters())
    if not weights:
        return False
    dtype = next((p.dtype for p in weights if p.is_floating_point()), dtype)
    x = torch.linspace(-1, 1, 3 * width, device=weights[0].device, dtype=dtype).view(1, 3, width)
    other = x.clone()
    other[:, 2] += 1
    outputs = []
    ambient = Ambient.now(x.device)
    try:
        for hidden in (x, other):
            with ambient.again(), torch.no_grad():
                outputs.append(module(hidden))
    except (RuntimeError, TypeError, ValueError):  # wants something else than hidden states of this width
        return False
    if not all(isinstance(y, Tensor) and y.shape == x.shape for y in outputs):
        return False
    return torch.equal(outputs[0][:, :2], outputs[1][:, :2])
