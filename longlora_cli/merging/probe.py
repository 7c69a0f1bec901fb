"""The proof: the written folder is loaded by plain transformers and its logits are compared with the sources'.

The sources take another road to the same logits: transformers loads them, PEFT applies the adapters, bitsandbytes
quantizes whole matrices. All of it in float32 on the CPU, so that only the rounding of the result's tensors is left
between the two. How much that may be, the merged model says itself: its weights are shaken once more by up to half a
unit in the last place of their dtype, and a difference of twice what that changes is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longlora_cli.errors import IncompatibleError, IntegrityError
from longlora_cli.merging.plan import Base, Ingredient, MergePlan
from longlora_cli.merging.quantized import Seen, int8_round_trip, nf4_round_trip
from longlora_cli.models import rope as positions
from longlora_cli.models.layout import Layout
from longlora_cli.models.loading import ModelFacts
from longlora_cli.models.rope import RopeRecord

# Larger models would take minutes and tens of gigabytes in float32.
_MAX_PARAMETERS = 1_500_000_000
_MAX_TOKENS = 2048
# Tokens times parameters of one forward pass, of which there are six: 0.5 seconds each at 100 GFLOP/s.
_WORK = 25_000_000_000
# Every weight is shaken, the untouched ones too, so one draw is already above what a right merge shows. The root mean
# square over thousands of logits hardly varies between draws; twice it leaves room for what does.
_MARGIN = 2.0
# Float32 forward passes that add the same numbers in another order differ by less than this share of the logits.
_FLOAT32 = 5e-5


@dataclass(frozen=True)
class ProbeResult:
    """How far the reloaded result is from its sources.

    Args:
        tokens: Length of each probe text.
        last_position: Position of its last token in the stretched probe.
        max_difference: Largest difference of a logit.
        mean_difference: Root of the mean squared difference of the logits; the text where it is larger.
        kl: Mean Kullback-Leibler divergence, nats per token, of the result from the sources.
        bound: The mean difference above which the result is refused.
    """

    tokens: int
    last_position: int
    max_difference: float
    mean_difference: float
    kl: float
    bound: float

    def to_json(self) -> dict[str, Any]:
        """For the result and the record."""
        return asdict(self)

    def describe(self) -> str:
        """One line for people."""
        return (
            f"logits differ from the sources' by {self.mean_difference:.2g} (bound {self.bound:.2g}), "
            f"at most {self.max_difference:.2g}; KL {self.kl:.2g} nats per token; "
            f"{self.tokens} tokens, positions to {self.last_position:,}"
        )


def reason_to_leave_out(layout: Layout, available_bytes: int | None) -> str | None:
    """Why the probe is not run for a model of this size, or None.

    Args:
        layout: Of the result.
        available_bytes: Free memory; None when it is not known.
    """
    if layout.size > _MAX_PARAMETERS:
        return f"{layout.size / 1e9:.1f}B parameters are more than the {_MAX_PARAMETERS / 1e9:.1f}B that are probed"
    needed = 3 * 4 * layout.size  # two float32 models and the logits
    if available_bytes is not None and needed > available_bytes:
        return f"it needs {needed / 2**30:.1f} GiB of memory, {available_bytes / 2**30:.1f} are free"
    return None


def available_memory() -> int | None:
    """Bytes the system can give without swapping, or None where it does not say."""
    path = Path("/proc/meminfo")
    if not path.is_file():
        return None
    for line in path.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def verify_positions(folder: Path, rope: RopeRecord | None) -> bool:
    """Build the rotary module that `folder`'s config.json asks for and compare it with the record.

    Returns:
        False when the kind of positions has no closed form here to compare with.

    Raises:
        IntegrityError: They differ.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if rope is None or rope.parameters["rope_type"] not in ("default", "linear", "dynamic", "yarn", "llama3"):
        return False
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    rotary = next((m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)), None)
    if rotary is None:
        raise IntegrityError(f"the model of {folder} has no rotary module")
    live = nn.ModuleList([type(rotary)(config=config)])
    try:
        positions.verify(live, rope, ModelFacts.of(config).head_dim)
    except IncompatibleError as error:
        raise IntegrityError(
            f"the merged model lost its positions: {error.message}", rule=error.rule
        ) from error
    return True


def run_probe(plan: MergePlan, folder: Path) -> ProbeResult:
    """Reload the written model, or the written adapter on its base, and compare it with the sources.

    Raises:
        IntegrityError: It differs by more than the rounding of its tensors.
    """
    from peft import PeftModel

    texts = _texts(plan.base.layout, plan.rope)
    expected = _logits(_reference(plan), texts)
    if plan.peft_config is None:
        written = _load(folder, None)
    else:
        written = PeftModel.from_pretrained(_load(plan.base.folder, plan.rope), str(folder)).eval()
    dtype = min((o.dtype for o in plan.outputs if o.dtype.is_floating_point), key=lambda d: d.itemsize)
    return _compare(written, expected, texts, dtype)


def _compare(
    model: Any, expected: Sequence[Tensor], texts: Sequence[dict[str, Tensor]], dtype: torch.dtype
) -> ProbeResult:
    found = _logits(model, texts)
    _shake(model, dtype)
    noise = _root_mean_square(found, _logits(model, texts))
    size = max(float(logits.square().mean().sqrt()) for logits in expected)
    divergence = [
        nn.functional.kl_div(f.log_softmax(-1), e.log_softmax(-1), reduction="batchmean", log_target=True)
        for f, e in zip(found, expected, strict=True)
    ]
    result = ProbeResult(
        tokens=texts[0]["input_ids"].shape[1],
        last_position=int(texts[-1]["position_ids"].max()),
        max_difference=max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True)),
        mean_difference=_root_mean_square(found, expected),
        kl=float(torch.stack(divergence).mean()),
        bound=max(_MARGIN * noise, _FLOAT32 * size),
    )
    if not result.mean_difference <= result.bound:  # written so that NaN is refused too
        raise IntegrityError(
            f"the merged model differs from its sources by {result.mean_difference:.3g} in the mean logit; "
            f"rounding explains {result.bound:.3g}",
            rule="A result that does not compute what its sources compute is not kept.",
        )
    return result


def _root_mean_square(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Of the differences of two sets of logits; the larger one of the texts."""
    return max(float((a - b).square().mean().sqrt()) for a, b in zip(one, other, strict=True))


def _texts(layout: Layout, rope: RopeRecord | None) -> list[dict[str, Tensor]]:
    """Two texts of the same random ids: at consecutive positions, and spread over the whole context length.

    Rotary attention sees only distances between positions; spreading the tokens makes it see all distances up to the
    full length, beyond the base's original one, at the price of a short text.
    """
    length = rope.max_position_embeddings if rope is not None else _MAX_TOKENS
    tokens = max(8, min(_MAX_TOKENS, length, _WORK // max(layout.size, 1)))
    vocabulary = layout.parameters[layout.embedding][0]
    ids = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    spread = max(1, length // tokens)
    return [
        {
            "input_ids": ids,
            "position_ids": torch.arange(tokens)[None] * step,
            # Without a mask, transformers takes a jump in the positions for the start of another document.
            "attention_mask": torch.ones(1, tokens, dtype=torch.long),
        }
        for step in (1, spread)
    ]


def _logits(model: Any, texts: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """`[tokens, vocabulary]` of each text, float32."""
    with torch.inference_mode():
        return [model(**text, use_cache=False).logits[0].float() for text in texts]


@torch.no_grad()
def _shake(model: nn.Module, dtype: torch.dtype) -> None:
    """Change each weight by up to half a unit in the last place of `dtype`, evenly at random."""
    generator = torch.Generator().manual_seed(0)
    half_unit = torch.finfo(dtype).eps / 2
    for parameter in model.parameters():
        noise = torch.empty_like(parameter).uniform_(-half_unit, half_unit, generator=generator)
        parameter.addcmul_(parameter, noise)


def _load(folder: Path, rope: RopeRecord | None) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if rope is not None:
        rope.apply(config)
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, trust_remote_code=False
    )
    return model.eval()


def _load_seen(base: Base, rope: RopeRecord | None, seen: Seen) -> Any:
    """A base in float32, its linear layers as quantization made them."""
    model = _load(base.folder, rope)
    if seen.quantization == "none":
        return model
    round_trip = nf4_round_trip if seen.quantization == "nf4" else int8_round_trip
    for name, parameter in model.named_parameters():
        if name in base.layout.linear:
            parameter.data = round_trip(parameter.data.to(seen.dtype)).float()
    return model


def _load_source(ingredient: Ingredient, seen: Seen, *, untie: bool) -> Any:
    from peft import PeftModel

    if ingredient.adapter is None:
        return _load(ingredient.base.folder, ingredient.rope)
    model = _load_seen(ingredient.base, ingredient.rope, seen)
    if untie and not ingredient.adapter.config.ensure_weight_tying:
        # Merging factors of an embedding in memory, PEFT would change a head that shares its tensor too.
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    return PeftModel.from_pretrained(model, str(ingredient.adapter.folder)).eval()


def _reference(plan: MergePlan) -> Any:
    """The model that the result should equal, by the roads of transformers and PEFT."""
    from transformers import AutoModelForCausalLM

    ingredients, weights, seen = plan.ingredients, plan.weights, plan.seen
    if list(weights) == [1.0]:
        return _load_source(ingredients[0], seen, untie=False)
    total: dict[str, Tensor] = {}
    first = ingredients[0]
    for ingredient, weight in zip(ingredients, weights, strict=True):
        model = _load_source(ingredient, seen, untie=True)
        _add(total, model.merge_and_unload() if ingredient.adapter else model, weight)
    if all(i.adapter is not None for i in ingredients):
        _add(total, _load_seen(first.base, first.rope, seen), 1.0 - sum(weights))
    config = type(first.base.config).from_pretrained(first.base.folder)
    if first.rope is not None:
        first.rope.apply(config)
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.load_state_dict(total)
    return model.eval()


def _add(total: dict[str, Tensor], model: Any, weight: float) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            total[name] = total[name].add_(tensor, alpha=weight) if name in total else tensor * weight
        else:
            total[name] = tensor.clone()
