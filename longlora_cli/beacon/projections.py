"""Beacons' own projections: trainable copies of frozen linear layers, used for beacon rows alone.

No module is replaced. Hooks on each projection give the base the raw rows of its input alone, run the copy on the
beacon rows, which stand behind them, and put the two results together. So names stay what they are, NF4 and int8 bases
stay as they are, and a low-rank adapter on the same layers serves raw rows alone: folding it into the base later
changes nothing for beacons. Zhang et al. 2024 (arXiv:2401.03462): "we introduce additional trainable projections for
the beacon tokens".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.errors import IncompatibleError
from longlora_cli.memory.nf4 import dequantized

SUBMODULE = "beacon"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


class _Copy(nn.Module):
    """One linear layer's own weight for beacons; no `nn.Linear`, so that adapters are never put on it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias) if bias is not None else None

    def forward(self, rows: Tensor) -> Tensor:
        """`[batch, rows, in]` -> `[batch, rows, out]`, in the rows' number format."""
        bias = self.bias.to(rows.dtype) if self.bias is not None else None
        return nn.functional.linear(rows, self.weight.to(rows.dtype), bias)


class BeaconProjections(nn.Module):
    """All that is trained for beacons: one embedding and a copy of each layer's projections.

    Args:
        decoder: The decoder of a Llama, Mistral, Qwen2 or Qwen3 model; it is not kept as a submodule.
        settings: Which projections have a copy.
        embedding: What beacons start from, `[width]`.

    Attributes:
        beacon_embedding: `[1, width]`.
        layers: For each decoder layer the copies by name (`q`, `k`, `v`, `o`).
    """

    def __init__(self, decoder: Any, settings: BeaconSettings, embedding: Tensor) -> None:
        super().__init__()
        self._decoder = (decoder,)  # in a tuple: else it would be a submodule of its own submodule
        self._hooks: dict[tuple[int, str], tuple[nn.Module, Any, Any]] = {}
        self._raw: int | None = None
        self._casting: list[Any] = []
        self._input: tuple[Tensor | None, tuple[Tensor, ...]] = (None, ())
        self.names = settings.projections
        master = master_dtype(embedding.dtype)
        self.beacon_embedding = nn.Parameter(embedding.detach().to(master, copy=True)[None])
        self.layers = nn.ModuleList()
        for layer in decoder.layers:
            copies = {name: getattr(layer.self_attn, f"{name}_proj") for name in self.names}
            self.layers.append(nn.ModuleDict({name: _copy(m, master) for name, m in copies.items()}))

    def bind(self) -> None:
        """Put the hooks on the projections, around an adapter's wrapper if there is one by now."""
        autocast = torch.is_autocast_enabled(self.beacon_embedding.device.type)
        self._casting = _casting_layers(self._decoder[0]) if autocast else []
        for number, layer in enumerate(self._decoder[0].layers):
            for name in self.names:
                module = getattr(layer.self_attn, f"{name}_proj")
                held = self._hooks.get((number, name))
                if held is not None and held[0] is module:
                    continue
                for handle in held[1:] if held is not None else ():
                    handle.remove()
                copies: Any = self.layers[number]
                before = module.register_forward_pre_hook(self._raw_rows)
                behind = module.register_forward_hook(self._with_beacons(copies[name]))
                self._hooks[number, name] = module, before, behind

    def unbind(self) -> None:
        """Take all hooks off; the base then computes as before."""
        for _, *handles in self._hooks.values():
            for handle in handles:
                handle.remove()
        self._hooks.clear()

    @contextmanager
    def route(self, raw: int | None) -> Iterator[None]:
        """While it is open, the rows of every forward pass behind so many raw ones are beacons; None: there are none.

        Under autocast an adapter then also leaves the number format of its input alone, see `_casting_layers`.
        """
        before, self._raw = self._raw, raw
        casting = [layer for layer in self._casting if layer.cast_input_dtype_enabled]
        for layer in casting:
            layer.cast_input_dtype_enabled = False
        try:
            yield
        finally:
            self._raw, self._input = before, (None, ())
            for layer in casting:
                layer.cast_input_dtype_enabled = True

    def _divided(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Raw rows and beacons; once for the projections that read the same."""
        if self._input[0] is not rows:
            self._input = rows, rows.split((self._raw, rows.shape[1] - self._raw), dim=1)  # type: ignore[operator]
        return self._input[1]

    def _raw_rows(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return None if self._raw is None else (self._divided(args[0])[0], *args[1:])

    def _with_beacons(self, copy: nn.Module) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self._raw is None:
                return None
            own = copy(self._input[1][1])
            return torch.cat((output, own.to(output.dtype)), 1)

        return hook


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for 16-bit models, as for low-rank adapters: an update of 2e-4 would be rounded away in bf16."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _casting_layers(model: nn.Module) -> list[Any]:
    """Adapter layers that make float32 copies of their inputs, which autocast makes 16-bit again at once.

    The numbers are the same without. An input is many times as wide as a rank, so that the two copies are more than
    all else that an adapter moves through memory. Variants that do more than two products with it keep theirs.
    """
    return [
        module
        for module in model.modules()
        if getattr(module, "cast_input_dtype_enabled", False) and not getattr(module, "lora_variant", None)
    ]


def _copy(module: nn.Module, dtype: torch.dtype) -> _Copy:
    base: Any = module
    while hasattr(base, "base_layer"):  # PEFT's wrappers
        base = base.base_layer
    bias = None if base.bias is None else base.bias.detach().to(dtype, copy=True)
    return _Copy(_weight(base).to(dtype, copy=True), bias)


def _weight(linear: Any) -> Tensor:
    """The matrix `[out, in]` that a linear layer multiplies with, also a quantized one."""
    weight = linear.weight
    kind = type(linear).__name__
    if kind == "Linear4bit":
        if getattr(weight, "quant_state", None) is None:
            raise IncompatibleError("4-bit weights that are not quantized yet have no numbers to copy")
        return dequantized(weight.data, weight.quant_state)
    if kind == "Linear8bitLt":
        scales = weight.SCB if weight.SCB is not None else linear.state.SCB
        codes = weight.data if weight.data.dtype == torch.int8 else linear.state.CB
        matrix: Tensor = codes.float() * (scales.float()[:, None] / 127)
        return matrix
    if not isinstance(linear, nn.Linear):
        raise IncompatibleError(f"beacons copy linear layers, not {kind}")
    plain: Tensor = weight.detach()
    return plain


def projections_of(causal_lm: Any) -> BeaconProjections | None:
    """The beacons attached to a model, or None."""
    found = getattr(causal_lm.get_decoder(), SUBMODULE, None)
    return found if isinstance(found, BeaconProjections) else None


def refuse_model(causal_lm: Any) -> None:
    """Refuse a model on which beacons cannot work.

    Raises:
        IncompatibleError: Another family; positions that depend on the length, so that a key cannot be turned from
            one position to another; attention that is not ours.
    """
    config = causal_lm.config
    if config.model_type not in FAMILIES:
        raise IncompatibleError(
            f"beacons on a {config.model_type} model", rule=f"They work on {', '.join(FAMILIES)} models."
        )
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise IncompatibleError(
            f"beacons with {kind} positions",
            rule="A beacon's key moves by a rotation, which needs frequencies that do not change with the length.",
            hint="Use --rope yarn, linear or theta.",
        )
    if not str(config._attn_implementation).startswith("longlora_"):
        raise IncompatibleError(
            f"beacons with {config._attn_implementation} attention",
            rule="Windows are told to longlora's own attention.",
            hint="Load the model with longlora_cli.models.loading.load_model.",
        )
