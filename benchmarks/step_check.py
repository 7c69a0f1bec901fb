"""Is the engine as exact as the plain path? Losses and gradients of both in bf16 against one float32 reference.

The reference is transformers' own code on float32 copies of the very numbers that the bf16 paths multiply by (NF4
dequantized to bf16), without TF32. LoRA's B is random, because the gradient of A is zero where B is.

The loss of a text is one number: bf16 leaves it by chance as often almost exact as not, so that one text of 2,048
tokens tells nothing about which path is better. Therefore several texts, and three sizes of what is compared, each as
the root-mean-square error over all of them relative to the reference:

- single tokens, thousands of numbers: any loss of precision shows;
- means over segments of 64 tokens, hundreds of numbers: an offset that neighbours share shows, which a token's own
  error hides;
- the loss itself, as many numbers as texts.

The engine's error may be `--slack` times the plain one. Hundreds of segments, and a handful of texts far more, differ
by chance alone. So there the plain error counts as at least what its token errors leave of a mean if they are
independent (no lucky text is the bar), and the engine's must exceed it by more than so many numbers explain (99 %
point of chi-squared: 1.1 with 256 segments, 1.6 with 8 texts). Tokens and gradients have no such allowance.

The engine's token losses are those of the training call whose gradient is compared: its last hidden states are seen
on their way into `normed_loss`, and their losses must add up to what it returned.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from step_rig import build, load_base, release, say, with_adapter
from torch import Tensor

from longlora_cli.memory import engine
from longlora_cli.memory.attention import attention_name
from longlora_cli.memory.elementwise import rms_norm
from longlora_cli.memory.loss import IGNORE

SEQ = (2048, 8192)
# Texts of a length if `--texts` says nothing: 8 of 2K, 4 of 8K and more.
_TOKENS_OF_A_LENGTH = 16_384
_FEWEST_TEXTS, _MOST_TEXTS = 4, 8
SEGMENT_TOKENS = 64
_B_DEVIATION = 0.01
_ROWS = 1024  # of logits in float32 at one time
# Of a loss summed twice in float32; bf16 moves it by 1e-5 and more.
_SAME_SUM = 5e-6
_Z_99 = 2.326  # of the normal distribution


@dataclass(frozen=True)
class Result:
    """One text's loss, its tokens' losses `[tokens - 1]` in float64, and its gradients by name, all on the CPU."""

    loss: float
    tokens: Tensor
    gradients: dict[str, Tensor]


def check(options: argparse.Namespace, device: torch.device) -> bool:
    """Print relative errors of both paths; whether the engine's are at most `--slack` times the plain ones."""
    lengths = options.seq or list(SEQ)
    draw = torch.Generator().manual_seed(2)
    texts = {n: [_text(n, draw, device) for _ in range(options.texts or default_texts(n))] for n in lengths}
    rig = build(options, "longlora", device)
    rig.settle(max(lengths))
    model = rig.causal_lm
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=_B_DEVIATION)
    ours = {n: [_train(model, ids, autocast=False) for ids in texts[n]] for n in lengths}
    rig.undo()
    rig.put_back()
    model.set_attn_implementation("sdpa")
    plain = {n: [_train(model, ids, autocast=True) for ids in texts[n]] for n in lengths}
    reference = _reference(options, model, device)
    good = True
    for tokens in lengths:
        exact = [_train(reference, ids, autocast=False) for ids in texts[tokens]]
        good &= compare(tokens, exact, ours[tokens], plain[tokens], options.slack)
        release(device)
    return good


def default_texts(tokens: int) -> int:
    """How many texts of this length are compared."""
    return min(max(_TOKENS_OF_A_LENGTH // tokens, _FEWEST_TEXTS), _MOST_TEXTS)


def _text(tokens: int, draw: torch.Generator, device: torch.device) -> Tensor:
    return torch.randint(3, 512, (1, tokens), generator=draw).to(device)


def _train(model: Any, ids: Tensor, *, autocast: bool) -> Result:
    """Forward and backward of one text, as training runs them."""
    with _token_losses_seen() as seen, torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
        found = model(input_ids=ids, labels=ids)
    tokens = seen[0] if seen else _losses_of(found.logits[0, :-1].detach(), ids[0, 1:])
    loss = float(found.loss.detach())
    if not math.isclose(float(tokens.mean()), loss, rel_tol=_SAME_SUM):
        raise RuntimeError(f"token losses have the mean {float(tokens.mean())}, and the loss is {loss}")
    found.loss.backward()
    # As they are, float32: a dozen texts' would take 2 GiB in float64.
    gradients = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Result(loss, tokens, gradients)


@contextlib.contextmanager
def _token_losses_seen() -> Iterator[list[Tensor]]:
    """Losses of single tokens of the engine's calls meanwhile, in `normed_loss`'s own arithmetic and tiles."""
    seen: list[Tensor] = []
    real = engine.normed_loss

    def watch(
        x: Tensor, norm: Tensor, eps: float, head: Tensor, labels: Tensor, *, tile_tokens: int
    ) -> tuple[Tensor, Tensor]:
        losses = []
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            for rows in labels.ne(IGNORE).nonzero().squeeze(1).split(tile_tokens):
                normed, _ = rms_norm(x.detach()[rows], norm, eps)
                losses.append(_losses_of(normed @ head.to(x.dtype).T, labels[rows]))
        seen.append(torch.cat(losses))
        return real(x, norm, eps, head, labels, tile_tokens=tile_tokens)

    with mock.patch.object(engine, "normed_loss", watch):
        yield seen


def _losses_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target under its row of logits; in float32, then float64 on the CPU."""
    parts = []
    for rows, wanted in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True):
        wide = rows.float()
        parts.append(wide.logsumexp(1) - wide.gather(1, wanted[:, None]).squeeze(1))
    return torch.cat(parts).double().cpu()


def _reference(options: argparse.Namespace, model: Any, device: torch.device) -> Any:
    """A float32 model with the same numbers."""
    torch.set_float32_matmul_precision("highest")
    base = load_base(options, device, stack="hf", quantized=False).float()
    # Repeats key heads for torch's memory-efficient kernel, which takes float32; plain softmax has 8 GiB of scores.
    base.set_attn_implementation(attention_name("efficient" if device.type == "cuda" else "math", device))
    reference = with_adapter(base, quantized=False).get_base_model()
    rotary = reference.get_decoder().rotary_emb
    rotate = rotary.forward
    # Tables rounded to bf16 are numbers of the model as it is read, like its weights.
    rotary.forward = lambda x, position_ids: tuple(t.bfloat16().float() for t in rotate(x, position_ids))
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            owner = modules[name.rpartition(".")[0]]
            state = getattr(getattr(owner, "weight", None), "quant_state", None)
            parameter.copy_(parameters[name] if state is None else _dequantized(owner.weight, state))
    return reference


def _dequantized(weight: Tensor, state: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)


def compare(tokens: int, exact: list[Result], ours: list[Result], plain: list[Result], slack: float) -> bool:
    """One table over all texts of a length; whether no line of it is too large."""
    say(f"{tokens:,} tokens, {len(exact)} texts: root-mean-square relative error against float32")
    say(f"  {'':24} {'engine':>10} {'plain':>10} {'ratio':>7}")
    of_tokens = [_spread([r.tokens for r in found], [r.tokens for r in exact]) for found in (ours, plain)]
    good = _line("token losses", *of_tokens, slack)
    for name, size in ((f"losses of {SEGMENT_TOKENS} tokens", SEGMENT_TOKENS), ("loss", tokens)):
        means = [[_means(r, size) for r in found] for found in (ours, plain, exact)]
        allowed = slack * chance(sum(len(m) for m in means[2]))
        floor = of_tokens[1] / math.sqrt(min(size, tokens - 1))
        good &= _line(name, *(_spread(found, means[2]) for found in means[:2]), allowed, floor=floor)
    if not set(exact[0].gradients) == set(ours[0].gradients) == set(plain[0].gradients):
        say("  the paths have gradients of different parameters")
        return False
    groups = defaultdict(list)
    for name in exact[0].gradients:
        groups[_group(name)].append(name)
    for group, names in groups.items():
        wanted = [r.gradients[n] for r in exact for n in names]
        errors = [_spread([r.gradients[n] for r in found for n in names], wanted) for found in (ours, plain)]
        good &= _line(group, *errors, slack)
    return good


def _means(result: Result, size: int) -> Tensor:
    """Losses of segments of `size` tokens; the whole text's is the one that trains."""
    if size > len(result.tokens):
        return torch.tensor([result.loss]).double()
    return torch.stack([part.mean() for part in result.tokens.split(size)])


def _group(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.lora_A.default.weight` -> `q_proj.lora_A`: one error over all layers."""
    words = [word for word in name.split(".") if not word.isdigit() and word not in ("default", "weight")]
    return ".".join(words[-2:])


def _spread(found: list[Tensor], exact: list[Tensor]) -> float:
    """Root-mean-square error of all numbers together, relative to their root mean square."""
    wrong = sum(float((f.double() - e.double()).square().sum()) for f, e in zip(found, exact, strict=True))
    return math.sqrt(wrong / sum(float(e.double().square().sum()) for e in exact))


def chance(numbers: int) -> float:
    """By what factor the root mean square of so few normal numbers exceeds their deviation once in a hundred times.

    The square root of the 99 % point of chi-squared over its degrees of freedom, by the approximation of Wilson and
    Hilferty 1931 (PNAS 17:684).
    """
    part = 2 / (9 * numbers)
    return float((1 - part + _Z_99 * math.sqrt(part)) ** 1.5)


def _line(name: str, ours: float, plain: float, slack: float, *, floor: float = 0.0) -> bool:
    good = ours <= slack * max(plain, floor)
    ratio = ours / plain if plain else float("inf")
    say(f"  {name:24} {ours:>10.3e} {plain:>10.3e} {ratio:>7.3f}{'' if good else '  TOO LARGE'}")
    return good
