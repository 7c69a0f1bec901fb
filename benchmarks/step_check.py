"""Is the engine as exact as the plain path? Loss and gradients of both in bf16 against one float32 reference.

The reference is transformers' own code on float32 copies of the very numbers that the bf16 paths multiply by (NF4
dequantized to bf16), without TF32. LoRA's B is random, because the gradient of A is zero where B is.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import Any

import torch
from step_rig import build, load_base, release, say, with_adapter
from torch import Tensor

from longlora_cli.memory.attention import attention_name

SEQ = (2048, 8192)
_B_DEVIATION = 0.01
# The loss is one number: by luck either path can be almost exact. Below this share of it neither counts as worse.
_LOSS_FLOOR = 3e-5
Result = tuple[float, dict[str, Tensor]]


def check(options: argparse.Namespace, device: torch.device) -> bool:
    """Print relative errors of both paths; whether the engine's are at most `--slack` times the plain ones."""
    lengths = options.seq or list(SEQ)
    texts = [torch.randint(3, 512, (1, tokens), device=device) for tokens in lengths]
    rig = build(options, "longlora", device)
    rig.settle(max(lengths))
    model = rig.causal_lm
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=_B_DEVIATION)
    ours = [_loss_and_gradients(model, ids, autocast=False) for ids in texts]
    rig.undo()
    rig.put_back()
    model.set_attn_implementation("sdpa")
    plain = [_loss_and_gradients(model, ids, autocast=True) for ids in texts]
    reference_model = _reference(options, model, device)
    good = True
    for tokens, ids, engine_result, plain_result in zip(lengths, texts, ours, plain, strict=True):
        exact = _loss_and_gradients(reference_model, ids, autocast=False)
        good &= _compare(tokens, exact, engine_result, plain_result, options.slack)
        release(device)
    return good


def _loss_and_gradients(model: Any, ids: Tensor, *, autocast: bool) -> Result:
    """The loss, and each gradient in float64 on the CPU, by name."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), found


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


def _compare(tokens: int, exact: Result, ours: Result, plain: Result, slack: float) -> bool:
    say(f"{tokens:,} tokens: relative error against float32")
    say(f"  {'':24} {'engine':>10} {'plain':>10} {'ratio':>7}")
    losses = [abs(found[0] - exact[0]) / abs(exact[0]) for found in (ours, plain)]
    good = _line("loss", losses[0], losses[1], slack, floor=_LOSS_FLOOR)
    if not set(exact[1]) == set(ours[1]) == set(plain[1]):
        say("  the paths have gradients of different parameters")
        return False
    groups = defaultdict(list)
    for name in exact[1]:
        groups[_group(name)].append(name)
    for group, names in groups.items():
        errors = [_relative_error(names, found[1], exact[1]) for found in (ours, plain)]
        good &= _line(group, errors[0], errors[1], slack, floor=0.0)
    return good


def _group(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.lora_A.default.weight` -> `q_proj.lora_A`: one error over all layers."""
    words = [word for word in name.split(".") if not word.isdigit() and word not in ("default", "weight")]
    return ".".join(words[-2:])


def _relative_error(names: list[str], found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    wrong = sum(float((found[n] - exact[n]).square().sum()) for n in names)
    return float((wrong / sum(float(exact[n].square().sum()) for n in names)) ** 0.5)


def _line(name: str, ours: float, plain: float, slack: float, *, floor: float) -> bool:
    good = ours <= max(slack * plain, floor)
    ratio = ours / plain if plain else float("inf")
    say(f"  {name:24} {ours:>10.3e} {plain:>10.3e} {ratio:>7.3f}{'' if good else '  TOO LARGE'}")
    return good
