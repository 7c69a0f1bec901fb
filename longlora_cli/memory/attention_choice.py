"""Which attention kernel computes: by name, or by device, number format and document lengths."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from longlora_cli.errors import IncompatibleError, SettingsError
from longlora_cli.memory.attention_cuda import CudnnKernel, EfficientKernel, FlashKernel
from longlora_cli.memory.attention_documents import (
    AttentionKernel,
    BlockwiseKernel,
    CpuKernel,
    Gradients,
    PlainKernel,
)
from longlora_cli.memory.attention_fa4 import Fa4Kernel, fa4_problem, load_fa4

BACKENDS = ("auto", "fa4", "cudnn", "flash", "efficient", "torch", "math")
GPU_BACKENDS = ("fa4", "cudnn", "efficient")

_logger = logging.getLogger("longlora")
# Measured on one H100, 32q/8kv and 4q/1kv heads, causal bf16: FlashAttention-4 overtakes cuDNN between 8K and 32K
# tokens of one document (74 against 273 TFLOP/s with 4 heads at 8K, 657 against 591 at 32K). Packed documents cost
# cuDNN a call each; FlashAttention-4 takes them in one call, at 607 TFLOP/s with documents of 8K, 343 with 2K.
_FA4_ONE_DOCUMENT = 16_384
_FA4_PACKED_DOCUMENTS = 4_096
# Below this, torch's own kernels are as fast as cuDNN's and need no plan.
_CUDNN_DOCUMENT = 2_048
_CUDNN_HEAD_DIM = 128
_FLASH_HEAD_DIM = 256


class AutoKernel:
    """Chooses by the documents of each call between FlashAttention-4, cuDNN and one that is always there."""

    name = "auto"

    def __init__(
        self, fa4: AttentionKernel | None, cudnn: AttentionKernel | None, other: AttentionKernel
    ) -> None:
        self._fa4, self._cudnn, self._other = fa4, cudnn, other

    def choose(self, lengths: Sequence[int]) -> AttentionKernel:
        """The kernel for documents of these lengths.

        FlashAttention-4 is judged by the mean over tokens of their document's length, because that is where the time
        goes; cuDNN by the mean over documents, because each is a call.
        """
        tokens = sum(lengths)
        if self._fa4 is not None:
            least = _FA4_ONE_DOCUMENT if len(lengths) == 1 else _FA4_PACKED_DOCUMENTS
            if sum(length * length for length in lengths) >= least * tokens:
                return _chosen(self._fa4, "documents are long enough")
        if self._cudnn is not None and tokens >= _CUDNN_DOCUMENT * len(lengths):
            return _chosen(self._cudnn, f"documents of {_CUDNN_DOCUMENT} tokens and more")
        return _chosen(self._other, "documents are short")

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `AttentionKernel.forward`."""
        return self.choose(lengths).forward(q, k, v, lengths, scale)

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
        """See `AttentionKernel.backward`; any kernel continues from any other's output and log-sum-exp."""
        return self.choose(lengths).backward(grad, q, k, v, out, lse, lengths, scale, overwrite=overwrite)


def choose_kernel(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int | None = None
) -> AttentionKernel:
    """The attention kernel of a backend.

    Args:
        backend: One of `BACKENDS`; `math` and `plain` are the plain twin. `auto`: on Hopper and Blackwell by the
            documents of each call (`AutoKernel`); on Ampere and Ada FlashAttention-2; on older GPUs and for float32
            memory-efficient attention; on other devices PyTorch's own.
        device: Where the tensors are.
        dtype: Their number format.
        head_dim: Width of a head.
        tokens: With `auto`: choose for one document of so many tokens, once and for all.

    Raises:
        SettingsError: An unknown backend, or one that this device does not have.
        IncompatibleError: A number format or head size that the named backend cannot compute.
    """
    device = torch.device(device)
    if backend == "auto":
        kernel = _automatic(device, dtype, head_dim)
        return kernel.choose([tokens]) if tokens is not None and isinstance(kernel, AutoKernel) else kernel
    if backend in ("math", "plain"):
        return PlainKernel()
    if backend == "torch" or (backend == "flash" and device.type == "cpu"):
        return CpuKernel() if device.type == "cpu" else BlockwiseKernel()
    refuse_backend(backend, device)
    if backend == "fa4":
        module, problem = load_fa4()
        if module is None:
            raise SettingsError(problem, hint="Use --attention auto.")
    _refuse_numbers(backend, dtype, head_dim)
    makers: dict[str, Callable[[], AttentionKernel]] = {
        "fa4": lambda: Fa4Kernel(module),
        "cudnn": CudnnKernel,
        "flash": FlashKernel,
        "efficient": EfficientKernel,
    }
    return makers[backend]()


def expected_kernel(backend: str, device: torch.device) -> str:
    """What a backend will probably compute long documents with, for predictions: nothing is imported or loaded."""
    if backend == "auto" and device.type == "cuda":
        return "cudnn" if fa4_problem(device) else "fa4"
    return backend


def refuse_backend(backend: str, device: torch.device) -> None:
    """Raise SettingsError for a backend that is unknown or that this device does not have."""
    if backend not in (*BACKENDS, "plain"):
        raise SettingsError(
            f"attention backend {backend!r} is unknown", hint=f"Known: {', '.join(BACKENDS)}."
        )
    if device.type == "cpu" and backend in GPU_BACKENDS:
        raise SettingsError(
            f"--attention {backend} needs a GPU",
            hint="On a CPU, --attention auto, torch, flash or math work.",
        )
    if backend == "fa4":
        problem = fa4_problem(device)
        if problem is not None:
            raise SettingsError(problem, hint="Use --attention auto.")


def _refuse_numbers(backend: str, dtype: torch.dtype, head_dim: int) -> None:
    half = dtype in (torch.float16, torch.bfloat16)
    widest = _CUDNN_HEAD_DIM if backend == "cudnn" else _FLASH_HEAD_DIM
    if backend == "efficient":
        fits, rule = dtype != torch.float64 and head_dim % 8 == 0, "It takes no float64 and multiples of 8."
    else:
        fits = half and head_dim % 8 == 0 and head_dim <= widest
        rule = f"It takes bf16 or fp16 and multiples of 8 up to {widest}."
    if not fits:
        raise IncompatibleError(
            f"--attention {backend} cannot compute {str(dtype).removeprefix('torch.')} with heads {head_dim} wide",
            rule=rule,
            hint="Use --attention auto.",
        )


def _automatic(device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionKernel:
    if device.type == "cpu":
        return _chosen(CpuKernel(), "on a CPU")
    if device.type != "cuda" or dtype == torch.float64 or head_dim % 8:
        return _chosen(BlockwiseKernel(), "no fused kernel for this device, number format or head size")
    major = torch.cuda.get_device_capability(device)[0]
    if dtype == torch.float32 or major < 8 or head_dim > _FLASH_HEAD_DIM:
        return _chosen(EfficientKernel(), "float32, heads wider than 256, or a GPU before Ampere")
    if major < 9:
        return _chosen(FlashKernel(), "an Ampere or Ada GPU")
    fa4: AttentionKernel | None = None
    problem = fa4_problem(device)
    if problem is None:
        module, problem = load_fa4()
        fa4 = Fa4Kernel(module) if module is not None and (major == 9 or head_dim <= 128) else None
    if fa4 is None:
        _log_once(f"attention: without FlashAttention-4 ({problem or 'heads wider than 128'})")
    return AutoKernel(fa4, CudnnKernel() if head_dim <= _CUDNN_HEAD_DIM else None, FlashKernel())


def _chosen(kernel: AttentionKernel, reason: str) -> AttentionKernel:
    _log_once(f"attention: {kernel.name} ({reason})")
    return kernel


@lru_cache(maxsize=64)
def _log_once(message: str) -> None:
    _logger.info(message)
