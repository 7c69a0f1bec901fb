"""FlashAttention-4 (package `flash-attn-4`, CuTe DSL), if it is installed: the fastest on Hopper from 16K tokens.

It is optional, alpha software, so it is found without being imported, imported at its first use, and its absence or
failure to load means cuDNN. Its functions are called by keyword: versions insert parameters in the middle. Kernels
are compiled at the first call of a head size and mask kind (5-15 s); `FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1`
keeps them between processes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from longlora_cli.memory.attention_cuda import document_starts
from longlora_cli.memory.attention_documents import Gradients

INSTALL = "pip install 'longlora-cli[fa4]'"


def fa4_problem(device: torch.device) -> str | None:
    """Why FlashAttention-4 cannot run on this device, or None. Imports nothing."""
    if device.type != "cuda":
        return "FlashAttention-4 needs a GPU"
    major = torch.cuda.get_device_capability(device)[0]
    if major not in (9, 10):
        return f"FlashAttention-4 needs a Hopper or Blackwell GPU, this one has compute capability {major}"
    # `find_spec("flash_attn.cute")` would import flash_attn, which may be FlashAttention-2 and take seconds.
    found = find_spec("flash_attn")
    folders = list(found.submodule_search_locations or ()) if found else []
    if not any((Path(folder) / "cute" / "interface.py").is_file() for folder in folders):
        return f"FlashAttention-4 is not installed ({INSTALL})"
    return None


@lru_cache(maxsize=1)
def load_fa4() -> tuple[ModuleType | None, str]:
    """The package's module with its forward and backward functions, or None and why it does not load."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # a compiler's notes about itself, which no user of ours can act on
            return import_module("flash_attn.cute.interface"), ""
    except Exception as error:  # noqa: BLE001 - a compiler stack: what it raises when it does not fit is not ours to list
        return None, f"FlashAttention-4 does not load: {type(error).__name__}: {error}"


class Fa4Kernel:
    """One document takes the fixed-length path, which is up to 60 % faster at 8K; several go in one call."""

    name = "fa4"

    def __init__(self, module: Any) -> None:
        self._forward, self._backward = module._flash_attn_fwd, module._flash_attn_bwd

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `AttentionKernel.forward`."""
        one = len(lengths) == 1
        with torch.cuda.device(q.device):
            # Betas from 19 on return more after these two.
            out, lse, *_ = self._forward(
                **_operands(one, q=q, k=k, v=v),
                **_packing(lengths, q.device),
                softmax_scale=scale,
                causal=True,
                return_lse=True,
            )
        return (out[0], lse[0]) if one else (out, lse)

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        lengths: Sequence[int],
        scale: float,
        *,
        overwrite: bool = False,
    ) -> Gradients:
        """See `AttentionKernel.backward`."""
        one = len(lengths) == 1
        targets = self._targets(q, k, v) if overwrite else {}
        with torch.cuda.device(q.device):
            dq, dk, dv, *_ = self._backward(
                **_operands(one, q=q, k=k, v=v, out=out, dout=grad, lse=lse, **targets),
                **_packing(lengths, q.device),
                softmax_scale=scale,
                causal=True,
            )
        return (dq[0], dk[0], dv[0]) if one else (dq, dk, dv)

    def forward_over(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int],
        key_lengths: Sequence[int],
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """See `attention_over_keys.OverKeys`; its causal mask, too, is aligned at the last query and key."""
        with torch.cuda.device(q.device):
            out, lse, *_ = self._forward(
                q=q,
                k=k,
                v=v,
                **_starts(lengths, key_lengths, q.device),
                softmax_scale=scale,
                causal=True,
                return_lse=True,
            )
        return out, lse

    def backward_over(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        lengths: Sequence[int],
        key_lengths: Sequence[int],
        scale: float,
    ) -> Gradients:
        """See `attention_over_keys.OverKeys`."""
        with torch.cuda.device(q.device):
            dq, dk, dv, *_ = self._backward(
                q=q,
                k=k,
                v=v,
                out=out,
                dout=grad,
                lse=lse,
                **_starts(lengths, key_lengths, q.device),
                softmax_scale=scale,
                causal=True,
            )
        return dq, dk, dv

    @staticmethod
    def _targets(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """Which gradients may be written over their operands.

        dq is summed in float32 and converted by a kernel of its own after the last read of q; dk and dv likewise, but
        only where several query heads share a KV head. The 256-wide Blackwell kernels write straight to the result.
        """
        if q.shape[2] == 256:
            return {}
        return {"dq": q, "dk": k, "dv": v} if q.shape[1] > k.shape[1] else {"dq": q}


def _operands(one: bool, **tensors: Tensor) -> dict[str, Tensor]:
    return {name: t[None] for name, t in tensors.items()} if one else tensors


def _packing(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    return {} if len(lengths) == 1 else _starts(lengths, lengths, device)


def _starts(lengths: Sequence[int], key_lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    return {
        "cu_seqlens_q": document_starts(tuple(lengths), device),
        "cu_seqlens_k": document_starts(tuple(key_lengths), device),
        "max_seqlen_q": max(lengths),
        "max_seqlen_k": max(key_lengths),
    }
