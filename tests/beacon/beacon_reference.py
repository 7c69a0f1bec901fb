"""Activation Beacon spelled out: one window at a time, keys without rotation, an explicit mask, every layer by hand.

The twin of `longlora_cli.beacon`. It shares no code with it but the weights: rows, positions and masks are made here
from the words of the method, keys of the memory are rotated anew in each window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longlora_cli.beacon.projections import BeaconProjections
from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.beacon.weights import attach
from longlora_cli.memory.attention import attention_name
from longlora_cli.models.loading import LoadedModel, ModelFacts
from longlora_cli.models.rope import RopeRecord
from longlora_cli.models.source import ModelSource

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


class ExactRotary(nn.Module):
    """Rotary positions in float64; transformers' own work in float32 and would hide errors of 1e-7."""

    def __init__(self, inv_freq: Tensor, attention_scaling: float) -> None:
        super().__init__()
        self.inv_freq = inv_freq.double()
        self.attention_scaling = attention_scaling

    def _apply(self, fn: Any, recurse: bool = True) -> ExactRotary:
        """Move with the model, but keep float64 when the weights become bf16."""
        self.inv_freq = self.inv_freq.to(fn(self.inv_freq).device)
        return self

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].double() * self.inv_freq
        both = torch.cat((angles, angles), -1)
        return (both.cos() * self.attention_scaling).to(x.dtype), (both.sin() * self.attention_scaling).to(
            x.dtype
        )


def exact_norm(module: nn.Module, x: Tensor) -> Tensor:
    """RMSNorm without transformers' detour over float32."""
    scaled = x * (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()
    return module.weight * scaled


def tiny_model(
    family: str = "llama", *, seed: int = 0, layers: int = 3, rope: dict[str, Any] | None = None
) -> Any:
    """A random causal LM in float64 whose norms and positions are exact; 2 KV heads for 4 query heads."""
    from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    kinds = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "rope_parameters": rope or {"rope_type": "default", "rope_theta": 100.0},
    }
    torch.manual_seed(seed)
    config = kinds[family](**sizes)
    name = attention_name("auto", torch.device("cpu"))
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation=name)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            nn.init.normal_(module.weight, mean=1.0, std=0.2)
            module.forward = exact_norm.__get__(module)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = ExactRotary(rotary.inv_freq, rotary.attention_scaling)
    return model.eval().requires_grad_(False)


def loaded(model: Any) -> LoadedModel:
    """The model as a session takes it."""
    facts = ModelFacts.of(model.config)
    return LoadedModel(
        model,
        None,
        ModelSource("tiny"),
        RopeRecord.of(model.config),
        facts,
        torch.device("cpu"),
        "fp32",
        "none",
        256,
    )


def with_beacons(model: Any, settings: BeaconSettings, *, seed: int = 1) -> BeaconProjections:
    """Beacons that are no copies any more, so that it matters which rows they are used for."""
    projections = attach(model, settings, eos_token_id=2, bos_token_id=1)
    generator = torch.Generator().manual_seed(seed)
    for parameter in projections.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return projections


def _rows(settings: BeaconSettings, ratio: int, filled: int) -> list[tuple[str, int]]:
    rows: list[tuple[str, int]] = []
    for token in range(filled):
        rows.append(("raw", token))
        if ratio and settings.position == "interleave" and (token + 1) % ratio == 0:
            rows.append(("beacon", (token + 1) // ratio - 1))
    if ratio and settings.position == "append" and filled == settings.window:
        rows += [("beacon", number) for number in range(settings.hop // ratio)]
    return rows


def _sees(settings: BeaconSettings, ratio: int, q: int, k: int, rows: Sequence[tuple[str, int]]) -> bool:
    """May row q see row k of the same window?"""
    (q_kind, q_number), (k_kind, k_number) = rows[q], rows[k]
    hiding = settings.attention != "full-coverage" or not settings.attend_prev
    if q == k:
        return True
    if not hiding:
        return k < q
    if q_kind == "raw":
        return k_kind == "raw" and k_number < q_number
    if k_kind == "beacon":
        return settings.attend_prev and k_number < q_number
    if settings.attention == "step-expansion":
        return k_number < (q_number + 1) * ratio
    if settings.attention == "segmentation":
        return q_number * ratio <= k_number < (q_number + 1) * ratio
    return True


def _position(settings: BeaconSettings, ratio: int, row: int, rows: Sequence[tuple[str, int]]) -> int:
    """A row's place in its window: behind everything that it sees; raw tokens count as if no hidden beacon were."""
    kind, number = rows[row]
    if settings.attention == "full-coverage" and settings.attend_prev:
        return row
    if kind == "raw":
        return number
    last_raw = max(
        n for k, (kk, n) in enumerate(rows) if kk == "raw" and _sees(settings, ratio, row, k, rows)
    )
    return last_raw + 1 + (number if settings.attend_prev else 0)


class Reference:
    """Reads a sequence; `logits` of all its raw tokens `[tokens, vocabulary]`.

    Args:
        model: From `tiny_model`, beacons attached or not.
        settings: The plan.
        ratios: Of each window.
        training: The last window has no beacons.
    """

    def __init__(
        self, model: Any, settings: BeaconSettings, ratios: Sequence[int], *, training: bool = False
    ) -> None:
        self.model, self.settings, self.ratios, self.training = model, settings, ratios, training
        self.decoder = model.model
        self.beacons: Any = getattr(self.decoder, "beacon", None)
        layers = len(self.decoder.layers)
        self.memory: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(layers)]  # unrotated key, value
        self.stay: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(layers)]

    def logits(self, ids: Sequence[int]) -> Tensor:
        found = []
        for number, (ratio, old, new, closes) in enumerate(self._windows(list(ids))):
            found.append(self._window(number, ratio, old, new, closes))
        return torch.cat(found)

    def _windows(self, ids: list[int]) -> Iterator[tuple[int, int, list[int], bool]]:
        window, hop, number, start = self.settings.window, self.settings.hop, 0, 0
        while start < len(ids):
            old = window - hop if number else 0
            new = ids[start : start + window - old]
            start += len(new)
            full = old + len(new) == window
            last = self.training and start == len(ids)
            ratio = 0 if last else self.ratios[number % len(self.ratios)]
            yield ratio, old, new, full and not last
            number += 1

    def _window(self, number: int, ratio: int, old: int, new: list[int], closes: bool) -> Tensor:
        settings = self.settings
        rows = _rows(settings, ratio, old + len(new))
        computed = list(range(old, len(rows)))  # rows that stayed raw come first and are not computed again
        vectors = []
        for row in computed:
            kind, token = rows[row]
            if kind == "beacon":
                vectors.append(self.beacons.beacon_embedding[0])
            else:
                vectors.append(self.decoder.embed_tokens.weight[new[token - old]])
        hidden = torch.stack(vectors)
        keys_of: list[list[tuple[Tensor, Tensor]]] = []
        for index, layer in enumerate(self.decoder.layers):
            hidden, own = self._layer(index, layer, hidden, rows, computed, ratio)
            keys_of.append(own)
        if closes:
            self._close(number, ratio, rows, keys_of)
        raw = [at for at, row in enumerate(computed) if rows[row][0] == "raw"]
        return self.model.lm_head(exact_norm(self.decoder.norm, hidden[raw]))

    def _layer(
        self, index: int, layer: Any, hidden: Tensor, rows: Any, computed: list[int], ratio: int
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        attention = layer.self_attn
        x = exact_norm(layer.input_layernorm, hidden)
        queries, own = [], list(self.stay[index])
        for at, row in enumerate(computed):
            beacon = rows[row][0] == "beacon"
            q, k, v = (self._project(index, attention, name, x[at], beacon).view(-1, 8) for name in "qkv")
            if hasattr(attention, "q_norm"):
                q, k = exact_norm(attention.q_norm, q), exact_norm(attention.k_norm, k)
            queries.append(q)
            own.append((k, v))
        memory = self.memory[index]
        outputs = []
        for at, row in enumerate(computed):
            seen = [k for k in range(len(own)) if k <= row and _sees(self.settings, ratio, row, k, rows)]
            places = [*range(len(memory))]
            places += [len(memory) + _position(self.settings, ratio, k, rows) for k in seen]
            held = [*memory, *(own[k] for k in seen)]
            query = self._rotate(queries[at], len(memory) + _position(self.settings, ratio, row, rows))
            keys = torch.stack([self._rotate(k, place) for (k, _), place in zip(held, places, strict=True)])
            values = torch.stack([v for _, v in held])
            keys, values = (t.repeat_interleave(2, 1) for t in (keys, values))
            weights = torch.einsum("hd,khd->hk", query, keys).mul(attention.scaling).softmax(-1)
            mixed = torch.einsum("hk,khd->hd", weights, values).reshape(-1)
            outputs.append(self._project(index, attention, "o", mixed, rows[row][0] == "beacon"))
        hidden = hidden + torch.stack(outputs)
        x = exact_norm(layer.post_attention_layernorm, hidden)
        mlp = layer.mlp
        return hidden + mlp.down_proj(nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)), own

    def _project(self, index: int, attention: Any, name: str, x: Tensor, beacon: bool) -> Tensor:
        module: Any = getattr(attention, f"{name}_proj")
        if beacon and name in self.beacons.names:
            module = self.beacons.layers[index][name]
        out = module.weight @ x
        return out if module.bias is None else out + module.bias

    def _rotate(self, x: Tensor, position: int) -> Tensor:
        rotary = self.decoder.rotary_emb
        angles = position * rotary.inv_freq
        cos, sin = angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling
        left, right = x[:, :4], x[:, 4:]
        return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)

    def _close(self, number: int, ratio: int, rows: Any, keys_of: list[list[tuple[Tensor, Tensor]]]) -> None:
        for index, own in enumerate(keys_of):
            for row, (kind, token) in enumerate(rows):
                sink = number == 0 and kind == "raw" and token < self.settings.sink
                dropped_raw = ratio == 0 and kind == "raw" and token < self.settings.hop
                if sink or dropped_raw:
                    self.memory[index].append(own[row])
            self.memory[index] += [own[row] for row, (kind, _) in enumerate(rows) if kind == "beacon"]
            stays = [row for row, (kind, t) in enumerate(rows) if kind == "raw" and t >= self.settings.hop]
            self.stay[index] = [own[row] for row in stays]
