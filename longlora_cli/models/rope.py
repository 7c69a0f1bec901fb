"""Rotary position embedding (RoPE): how a model's positions are stretched, recorded and checked.

A `RopeRecord` is set on the config *before* the model is built, because transformers computes the frequencies at
construction and ignores later changes; `verify` then compares the live frequencies with ones computed here from the
record alone. Formulas: Su et al. 2021 (arXiv:2104.09864); linear interpolation, Chen et al. 2023 (arXiv:2306.15595);
NTK base change and dynamic NTK, bloc97 2023 (LocalLLaMA); YaRN, Peng et al. 2023 (arXiv:2309.00071); Llama 3.1's
smoothing, Dubey et al. 2024 (arXiv:2407.21783).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longlora_cli.errors import IncompatibleError, SettingsError
from longlora_cli.sections import RopeSection

_ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class RopeRecord:
    """All that defines a model's positions.

    Args:
        parameters: transformers' `rope_parameters`: `rope_type`, `rope_theta` and what the type needs.
        max_position_embeddings: The config's own length; for `dynamic` the length from which it starts to scale.
    """

    parameters: dict[str, Any]
    max_position_embeddings: int

    @classmethod
    def of(cls, config: Any) -> RopeRecord:
        """Read it from a transformers config.

        Raises:
            IncompatibleError: The model has no RoPE, or a different one per layer type.
        """
        parameters = getattr(config, "rope_parameters", None)
        if not parameters:
            raise IncompatibleError(f"{config.model_type} models have no rotary positions to record")
        if any(isinstance(value, dict) for value in parameters.values()):
            raise IncompatibleError(
                f"{config.model_type} has different positions per layer type",
                rule="Only models with one RoPE for all layers can be extended.",
            )
        return cls(dict(parameters), int(config.max_position_embeddings))

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> RopeRecord:
        """The inverse of `to_json`."""
        return cls(dict(content["parameters"]), int(content["max_position_embeddings"]))

    def to_json(self) -> dict[str, Any]:
        """As stored beside adapters and merged models."""
        return {"parameters": dict(self.parameters), "max_position_embeddings": self.max_position_embeddings}

    def for_length(self, tokens: int) -> RopeRecord:
        """The same frequencies, allowed to read so many tokens: a run is trained on at a greater length.

        `dynamic` stays as it is: its length is the one from which it starts to scale.
        """
        if self.parameters["rope_type"] == "dynamic" or tokens <= self.max_position_embeddings:
            return self
        return RopeRecord(self.parameters, tokens)

    def apply(self, config: Any) -> None:
        """Set it on a config from which the model is about to be built."""
        config.rope_parameters = dict(self.parameters)
        config.max_position_embeddings = self.max_position_embeddings

    def legacy_keys(self) -> dict[str, Any]:
        """The keys that readers older than transformers 5 look for in config.json."""
        kind = self.parameters["rope_type"]
        scaling = None
        if kind != "default":
            scaling = {k: v for k, v in self.parameters.items() if k != "rope_theta"} | {"type": kind}
        return {"rope_theta": self.parameters["rope_theta"], "rope_scaling": scaling}

    def describe(self) -> str:
        """For people: `yarn, factor 4, theta 10,000`."""
        kind = self.parameters["rope_type"]
        factor = self.parameters.get("factor")
        parts = [kind] if kind != "default" else []
        parts += [f"factor {factor:g}"] if factor else []
        return ", ".join([*parts, f"theta {self.parameters['rope_theta']:,.0f}"])


def extend(base: RopeRecord, section: RopeSection, context_length: int | None, head_dim: int) -> RopeRecord:
    """The record after stretching `base` as the user asked.

    Args:
        base: The base model's own record.
        section: The settings; `rope: keep` returns `base` with a longer allowed length.
        context_length: Tokens to read; gives the factor when none is set.
        head_dim: Width of a head, for the NTK rule.

    Raises:
        SettingsError: No factor can be derived, or the base is scaled already in a way that cannot be combined.
    """
    kind, parameters = section.rope, dict(base.parameters)
    longer = max(base.max_position_embeddings, context_length or 0)
    if kind == "keep":
        keeps_length = parameters["rope_type"] == "dynamic"
        return RopeRecord(parameters, base.max_position_embeddings if keeps_length else longer)
    own_kind = parameters["rope_type"]
    if own_kind != "default" and kind != "theta":
        raise SettingsError(
            f"--rope {kind}: the base model's positions are scaled already ({base.describe()})",
            rule="A second scaling would replace the first and ruin the model.",
            hint="Use --rope theta, which keeps the scaling and raises its base frequency.",
        )
    if kind == "theta" and section.rope_theta is not None:
        return RopeRecord(parameters | {"rope_theta": float(section.rope_theta)}, longer)
    factor = _factor(base, section, context_length)
    if kind == "theta":
        theta = parameters["rope_theta"] * factor ** (head_dim / (head_dim - 2))
        return RopeRecord(parameters | {"rope_theta": float(theta)}, longer)
    own_length = base.max_position_embeddings
    parameters |= {"rope_type": kind, "factor": float(factor)}
    if kind == "yarn":
        parameters |= {_ORIGINAL: own_length}
    elif kind == "llama3":
        parameters |= {_ORIGINAL: own_length, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    stretched = max(longer, int(own_length * factor))
    # transformers' dynamic type measures growth against max_position_embeddings, so it must stay the base's.
    return RopeRecord(parameters, own_length if kind == "dynamic" else stretched)


def _factor(base: RopeRecord, section: RopeSection, context_length: int | None) -> float:
    if section.rope_factor is not None:
        return section.rope_factor
    if context_length is None or context_length <= base.max_position_embeddings:
        length = f"{context_length:,} tokens" if context_length else "no context length"
        raise SettingsError(
            f"--rope {section.rope} needs a factor: {length} given, the model reads {base.max_position_embeddings:,}",
            rule="The factor is the new context length over the model's own.",
            hint="Give --rope-factor, or leave --rope out.",
        )
    return context_length / base.max_position_embeddings


def inverse_frequencies(record: RopeRecord, head_dim: int) -> Tensor:
    """Radians per position of each rotated pair at the model's own length, float64 `[head_dim / 2]`.

    Raises:
        IncompatibleError: A RoPE type this project does not know.
    """
    p = record.parameters
    dim = int(head_dim * p.get("partial_rotary_factor", 1.0))
    plain = p["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    kind = p["rope_type"]
    if kind in ("default", "dynamic"):  # dynamic changes only beyond max_position_embeddings
        return plain
    if kind == "linear":
        return plain / p["factor"]
    if kind == "llama3":
        turns = p[_ORIGINAL] * plain / (2 * math.pi)
        smooth = (turns - p["low_freq_factor"]) / (p["high_freq_factor"] - p["low_freq_factor"])
        smooth = smooth.clamp(0, 1)
        return plain * (smooth + (1 - smooth) / p["factor"])
    if kind == "yarn":
        return _yarn(plain, p, dim)
    raise IncompatibleError(f"positions of type {kind!r} cannot be verified")


def _yarn(plain: Tensor, p: dict[str, Any], dim: int) -> Tensor:
    def pair_with_turns(turns: float) -> float:
        """Index of the pair that turns this often over the original length."""
        return dim * math.log(p[_ORIGINAL] / (turns * 2 * math.pi)) / (2 * math.log(p["rope_theta"]))

    low = pair_with_turns(p.get("beta_fast") or 32)
    high = pair_with_turns(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = (high - low) or 0.001
    interpolated = ((torch.arange(dim // 2, dtype=torch.float64) - low) / width).clamp(0, 1)
    return plain * (1 - interpolated) + plain / p["factor"] * interpolated


def attention_scale(record: RopeRecord) -> float:
    """Factor on cos and sin: YaRN's temperature `0.1 ln(factor) + 1`, else 1."""
    p = record.parameters
    if p["rope_type"] != "yarn":
        return 1.0
    given = p.get("attention_factor")
    return float(given) if given is not None else 0.1 * math.log(p["factor"]) + 1.0


def verify(model: nn.Module, record: RopeRecord, head_dim: int) -> None:
    """Compare every live rotary module with the record.

    Raises:
        IncompatibleError: A module turns at other frequencies, has another scale, or there is none.
    """
    expected = inverse_frequencies(record, head_dim)
    scale = attention_scale(record)
    modules = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
    if not modules:
        raise IncompatibleError("the model has no rotary module to verify")
    for module in modules:
        frequencies: Any = module.inv_freq
        live = frequencies.detach().to("cpu", torch.float64)
        # float32 powers of theta are good to about 1e-6; another theta or factor differs by 1e-2 and more.
        same = live.shape == expected.shape and torch.allclose(live, expected, rtol=1e-4, atol=0)
        live_scale = float(getattr(module, "attention_scaling", 1.0))
        if not same or not math.isclose(live_scale, scale, rel_tol=1e-6):
            raise IncompatibleError(
                f"the model's positions are not those of its record ({record.describe()})",
                rule="Its rotary frequencies were built from other settings.",
            )
