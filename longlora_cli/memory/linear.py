"""Linear layers that read the same input, with their LoRA riding along as a few more columns.

`y = x W^T + s (x A^T) B^T` is one matrix product of `[x | x A^T]` with `[W | s B]`: the low-rank part is added inside
the product's float32 sums, at the price of `rank` more columns (0.8 % at rank 32 and width 4,096), where a product of
its own would read and write `y` once more. Backward uses the same matrix: `dy [W | s B]` gives `dx`'s base part and the
gradient of `x A^T` together. Several layers (q, k, v; gate, up) stand under each other, so their input is read once.
NF4 weights (Dettmers et al. 2023, arXiv:2305.14314) are dequantized once per pass over a layer; the matrices of small
models are held ready instead, and only the adapter's columns are written again in each step. LoRA: Hu et al. 2021
(arXiv:2106.09685). The plain twin is PEFT's own forward and autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longlora_cli.memory.nf4 import dequantized
from longlora_cli.memory.plan import stack_width


def fusing_fault(module: nn.Module) -> str | None:
    """Why a linear layer, plain or with a PEFT adapter, cannot be fused; None when it can."""
    base: Any = getattr(module, "base_layer", module)
    kind = type(base).__name__
    if not isinstance(base, nn.Linear) or kind not in (
        "Linear",
        "Linear4bit",
        "NonDynamicallyQuantizableLinear",
    ):
        return f"{kind} layers"
    if kind == "Linear4bit" and getattr(base.weight, "quant_state", None) is None:
        return "4-bit weights that are not quantized yet"
    if base.bias is not None and base.bias.requires_grad:
        return "trained biases"
    if base.weight.requires_grad:
        return "trained full matrices"
    if module is base:
        return None
    adapters = [
        name for name in getattr(module, "active_adapters", []) if name in getattr(module, "lora_A", {})
    ]
    if len(adapters) > 1 or getattr(module, "merged", False) or getattr(module, "disable_adapters", False):
        return "several, merged or disabled adapters"
    for name in adapters:
        wrapper: Any = module
        if name in getattr(wrapper, "lora_variant", {}):
            return "LoRA variants such as DoRA"
        if getattr(wrapper.lora_dropout[name], "p", 0.0) > 0:
            return "LoRA dropout"
        if wrapper.lora_A[name].bias is not None or wrapper.lora_B[name].bias is not None:
            return "biases in LoRA"
    return None


@dataclass(frozen=True)
class _Part:
    """One linear layer of a stack."""

    base: Any
    down: nn.Parameter | None  # LoRA's A [rank, in]
    up: nn.Parameter | None  # LoRA's B [out, rank]
    scale: float

    @property
    def rank(self) -> int:
        return 0 if self.down is None else int(self.down.shape[0])

    def copy_weight(self, out: Tensor) -> None:
        """Write the base matrix `[out, in]` into `out`, dequantized."""
        state = getattr(self.base.weight, "quant_state", None)
        if state is None:
            out.copy_(self.base.weight)
            return
        out.copy_(dequantized(self.base.weight.data, state))


def _part(module: nn.Module) -> _Part:
    base: Any = getattr(module, "base_layer", module)
    wrapper: Any = module
    names = [n for n in getattr(wrapper, "active_adapters", []) if n in getattr(wrapper, "lora_A", {})]
    if module is base or not names:
        return _Part(base, None, None, 0.0)
    name = names[0]
    return _Part(base, wrapper.lora_A[name].weight, wrapper.lora_B[name].weight, float(wrapper.scaling[name]))


class LinearStack:
    """Linear layers with a common input `[tokens, in]` and their outputs side by side, `[tokens, sum of outs]`.

    Args:
        modules: `nn.Linear`, bitsandbytes `Linear4bit`, or PEFT's LoRA around one; see `fusing_fault`.

    With `hold` the matrices of `load` are kept from its first call on; the modules' frozen ones must not change then.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.parts = [_part(module) for module in modules]
        self.inputs = int(self.parts[0].base.in_features)
        self.outputs = sum(int(part.base.out_features) for part in self.parts)
        self.rank = sum(part.rank for part in self.parts)
        self.width = stack_width(self.inputs, self.rank)
        self.hold = False
        self._held: LoadedStack | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the products: of the frozen matrix, or what NF4 is dequantized to."""
        base = self.parts[0].base
        state = getattr(base.weight, "quant_state", None)
        found: torch.dtype = base.weight.dtype if state is None else (base.compute_dtype or state.dtype)
        return found

    @property
    def trained(self) -> list[nn.Parameter]:
        """LoRA's matrices that want a gradient, A before B, layer by layer; the order of `GradientSums.list`."""
        return [p for part in self.parts for p in (part.down, part.up) if p is not None and p.requires_grad]

    @property
    def held_bytes(self) -> int | None:
        """What holding takes; None where a matrix is dequantized for each pass, to save just this."""
        if any(getattr(part.base.weight, "quant_state", None) is not None for part in self.parts):
            return None
        return (self.outputs * self.width + self.rank * self.inputs) * self.dtype.itemsize

    def load(self, dtype: torch.dtype, device: torch.device, *, again: bool = False) -> LoadedStack:
        """Dequantize and cast what a pass over the layer needs.

        Args:
            dtype: Compute precision.
            device: Where it computes.
            again: A later pass of the same step; adapters that are held are taken as its first pass wrote them.
        """
        held = self._held
        if held is not None and (held.weight.dtype, held.weight.device) == (dtype, device):
            if not again:
                self._write_adapters(held.weight, held.down)
            return held
        weight = torch.empty(self.outputs, self.width, dtype=dtype, device=device)
        if self.width > self.inputs:  # each part's adapter fills its own rows of its columns alone
            weight[:, self.inputs :].zero_()
        row = 0
        for part in self.parts:
            part.copy_weight(weight[row : row + part.base.out_features, : self.inputs])
            row += part.base.out_features
        down = torch.empty(self.rank, self.inputs, dtype=dtype, device=device) if self.rank else None
        self._write_adapters(weight, down)
        loaded = LoadedStack(self, weight, down, self._bias(weight))
        if self.hold:
            self._held = loaded
        return loaded

    def _write_adapters(self, weight: Tensor, down: Tensor | None) -> None:
        """Put `s B` into its columns of `weight` and A into its rows of `down`, rounded once each."""
        row, rank = 0, 0
        for part in self.parts:
            end = row + part.base.out_features
            if part.up is not None and part.down is not None and down is not None:
                columns = slice(self.inputs + rank, self.inputs + rank + part.rank)
                torch.mul(part.up.detach(), part.scale, out=weight[row:end, columns])
                down[rank : rank + part.rank].copy_(part.down.detach())
            row, rank = end, rank + part.rank

    def _bias(self, weight: Tensor) -> Tensor | None:
        biases = [part.base.bias for part in self.parts]
        if all(bias is None for bias in biases):
            return None
        return torch.cat(
            [
                weight.new_zeros(part.base.out_features) if bias is None else bias.detach().to(weight.dtype)
                for bias, part in zip(biases, self.parts, strict=True)
            ]
        )


@dataclass(frozen=True)
class LoadedStack:
    """The matrices of a stack for one pass.

    Args:
        stack: Whose they are.
        weight: `[outputs, width]`: base and `s B`, in compute precision.
        down: All A matrices, `[rank, inputs]`, or None without adapters.
        bias: `[outputs]` or None.
    """

    stack: LinearStack
    weight: Tensor
    down: Tensor | None
    bias: Tensor | None

    def input_buffer(self, tokens: int) -> Tensor:
        """Room for `tokens` inputs and their low-rank part: `[tokens, width]`, the first `inputs` columns unset."""
        buffer = self.weight.new_empty(tokens, self.stack.width)
        if self.stack.width > self.stack.inputs + self.stack.rank:
            buffer[:, self.stack.inputs + self.stack.rank :].zero_()
        return buffer

    def reduce(self, buffer: Tensor) -> None:
        """Fill the low-rank columns of an input buffer, `x A^T`, from its first columns."""
        if self.down is not None:
            inputs, rank = self.stack.inputs, self.stack.rank
            torch.mm(buffer[:, :inputs], self.down.T, out=buffer[:, inputs : inputs + rank])

    def forward(self, buffer: Tensor, out: Tensor | None = None) -> Tensor:
        """Outputs `[tokens, outputs]` of a filled and reduced input buffer; written to `out` if given."""
        if self.bias is not None:
            result = torch.addmm(self.bias, buffer, self.weight.T)
        elif out is not None and out.is_contiguous():
            return torch.mm(buffer, self.weight.T, out=out)
        else:
            result = torch.mm(buffer, self.weight.T)
        return result if out is None else out.copy_(result)

    def backward(self, grad: Tensor, buffer: Tensor, sums: GradientSums) -> Tensor:
        """Gradient of the inputs, `[tokens, inputs]` (a view); LoRA's gradients are added to `sums`.

        Args:
            grad: Of the outputs, `[tokens, outputs]`.
            buffer: The input buffer of `forward`; only read.
            sums: Where this stack's gradients are collected over tiles.
        """
        inputs, rank = self.stack.inputs, self.stack.rank
        back = torch.mm(grad, self.weight)
        if self.down is None:
            return back[:, :inputs]
        reduced = back[:, inputs : inputs + rank]
        sums.add(self.stack, grad, buffer, reduced)
        return back[:, :inputs].addmm_(reduced, self.down)


def _mm_sum(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` with the result in at least float32, where a GPU can write it so."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


class GradientSums:
    """Sums of parameter gradients over the tiles of a layer, float32 (float64 for float64)."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def add(self, stack: LinearStack, grad: Tensor, buffer: Tensor, reduced: Tensor) -> None:
        """Add one tile: `grad` of outputs, `buffer` of inputs, `reduced` = gradient of `x A^T`, `[tokens, rank]`."""
        inputs = stack.inputs
        wants_down = any(part.down is not None and part.down.requires_grad for part in stack.parts)
        down = _mm_sum(reduced.T, buffer[:, :inputs]) if wants_down else None
        row = column = 0
        for part in stack.parts:
            rows, columns = slice(row, row + part.base.out_features), slice(column, column + part.rank)
            if part.down is not None and part.down.requires_grad and down is not None:
                self.put(part.down, down[columns])
            if part.up is not None and part.up.requires_grad:
                low = buffer[:, inputs + columns.start : inputs + columns.stop]
                up = _mm_sum(grad[:, rows].T, low)
                self.put(part.up, up if part.scale == 1.0 else up.mul_(part.scale))
            row, column = rows.stop, columns.stop

    def put(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Add to one parameter's gradient; the first value is kept and added to, so it must be the caller's to give."""
        key = id(parameter)
        if key in self._sums:
            self._sums[key] += value
        else:
            self._sums[key] = value

    def zeros_for(self, parameter: nn.Parameter) -> Tensor:
        """The parameter's sum to be added to in place, starting at zero."""
        wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        return self._sums.setdefault(
            id(parameter), torch.zeros(parameter.shape, dtype=wide, device=parameter.device)
        )

    def list(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Gradients in the order of `parameters`, each in its parameter's precision."""
        return [
            self._sums[id(p)].to(p.dtype) if id(p) in self._sums else torch.zeros_like(p) for p in parameters
        ]
