"""Which kernel computes, by device, number format, head size and document lengths, and that the log says so."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from longlora_cli.errors import IncompatibleError, SettingsError
from longlora_cli.memory import attention_choice, attention_fa4
from longlora_cli.memory.attention_choice import AutoKernel, choose_kernel
from longlora_cli.memory.attention_cuda import CudnnKernel, EfficientKernel, FlashKernel
from longlora_cli.memory.attention_documents import AttentionKernel, BlockwiseKernel, CpuKernel, PlainKernel
from longlora_cli.memory.attention_fa4 import Fa4Kernel, fa4_problem, load_fa4

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BF16 = torch.bfloat16


def loaded() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] == "flash_attn"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Nothing is known yet, and what a test imports in the package's name does not outlive it."""
    before = {name: sys.modules.pop(name) for name in loaded()}
    attention_choice._log_once.cache_clear()
    load_fa4.cache_clear()
    yield
    for name in loaded():
        del sys.modules[name]
    sys.modules.update(before)
    load_fa4.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, major: int, fa4: bool = False, path: Path | None = None) -> None:
    """A GPU of this compute capability, with or without a package that looks like FlashAttention-4."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    if fa4:
        assert path is not None
        folder = path / "flash_attn" / "cute"
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder / "interface.py").write_text("_flash_attn_fwd = _flash_attn_bwd = len\n")
        monkeypatch.syspath_prepend(str(path))


class LooksLikeFa4:
    _flash_attn_fwd = _flash_attn_bwd = len


HOPPER = AutoKernel(Fa4Kernel(LooksLikeFa4), CudnnKernel(), FlashKernel())


@pytest.mark.parametrize(
    ("lengths", "name"),
    [
        ([16_384], "fa4"),
        ([131_072], "fa4"),
        ([16_383], "cudnn"),
        ([2_048], "cudnn"),
        ([2_047], "flash"),
        ([4_096] * 2, "fa4"),
        ([4_095] * 2, "cudnn"),
        ([2_000] * 8, "flash"),
        ([60_000, *[100] * 50], "fa4"),  # most tokens are in a long document, though the mean one is short
        ([1] * 100, "flash"),
    ],
)
def test_on_hopper_the_documents_decide(lengths: list[int], name: str) -> None:
    assert HOPPER.choose(lengths).name == name


@pytest.mark.parametrize(
    ("lengths", "name"), [([16_384], "cudnn"), ([4_096] * 2, "cudnn"), ([2_000] * 8, "flash")]
)
def test_without_flash_attention_4_cudnn_takes_long_documents(lengths: list[int], name: str) -> None:
    assert AutoKernel(None, CudnnKernel(), FlashKernel()).choose(lengths).name == name


def test_heads_too_wide_for_cudnn_stay_with_flash_attention() -> None:
    assert AutoKernel(None, None, FlashKernel()).choose([16_384]).name == "flash"


@pytest.mark.parametrize(
    ("major", "dtype", "head_dim", "kind"),
    [
        (9, BF16, 128, AutoKernel),
        (12, BF16, 128, AutoKernel),
        (8, BF16, 128, FlashKernel),
        (8, torch.float16, 256, FlashKernel),
        (8, torch.float32, 128, EfficientKernel),
        (9, torch.float32, 128, EfficientKernel),
        (9, BF16, 512, EfficientKernel),
        (7, torch.float16, 64, EfficientKernel),
        (9, torch.float64, 64, BlockwiseKernel),
        (9, BF16, 20, BlockwiseKernel),
    ],
)
def test_auto_goes_by_compute_capability_number_format_and_head_size(
    monkeypatch: pytest.MonkeyPatch,
    major: int,
    dtype: torch.dtype,
    head_dim: int,
    kind: type[AttentionKernel],
) -> None:
    pretend(monkeypatch, major)
    assert type(choose_kernel("auto", GPU, dtype, head_dim)) is kind


def test_auto_on_a_cpu_is_pytorchs_cpu_kernel() -> None:
    assert type(choose_kernel("auto", CPU, torch.float64, 7)) is CpuKernel


def test_an_installed_flash_attention_4_is_found_without_being_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend(monkeypatch, 9, fa4=True, path=tmp_path)
    assert fa4_problem(GPU) is None
    assert "flash_attn.cute" not in sys.modules
    assert choose_kernel("auto", GPU, BF16, 128, tokens=16_384).name == "fa4"
    assert choose_kernel("fa4", GPU, BF16, 128).name == "fa4"
    assert "flash_attn.cute.interface" in sys.modules


def test_a_flash_attention_4_that_does_not_load_means_cudnn_and_a_reason_in_the_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pretend(monkeypatch, 9, fa4=True, path=tmp_path)
    (tmp_path / "flash_attn" / "cute" / "interface.py").write_text("raise RuntimeError('no compiler')\n")
    with caplog.at_level(logging.INFO, "longlora"):
        assert choose_kernel("auto", GPU, BF16, 128, tokens=131_072).name == "cudnn"
    assert "FlashAttention-4 does not load: RuntimeError: no compiler" in caplog.text
    with pytest.raises(SettingsError, match="does not load"):
        choose_kernel("fa4", GPU, BF16, 128)


@pytest.mark.parametrize(
    ("major", "problem"), [(8, "needs a Hopper or Blackwell GPU"), (9, "is not installed")]
)
def test_flash_attention_4_asked_for_where_it_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, major: int, problem: str
) -> None:
    pretend(monkeypatch, major)
    monkeypatch.setattr(attention_fa4, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=problem):
        choose_kernel("fa4", GPU, BF16, 128)


def test_each_choice_is_logged_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "longlora"):
        for lengths in ([2_048], [4_000], [100], [3_000], [50]):
            HOPPER.choose(lengths)
    assert caplog.messages == [
        "attention: cudnn (documents of 2048 tokens and more)",
        "attention: flash (documents are short)",
    ]


@pytest.mark.parametrize("backend", ["fa4", "cudnn", "efficient"])
def test_a_gpu_kernel_on_a_cpu_is_refused(backend: str) -> None:
    with pytest.raises(SettingsError, match=f"--attention {backend} needs a GPU"):
        choose_kernel(backend, CPU, torch.float32, 64)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(SettingsError, match="'fast' is unknown"):
        choose_kernel("fast", CPU, torch.float32, 64)


@pytest.mark.parametrize(
    ("backend", "dtype", "head_dim"),
    [
        ("cudnn", torch.float32, 64),
        ("flash", BF16, 512),
        ("cudnn", BF16, 256),
        ("efficient", torch.float64, 64),
    ],
)
def test_numbers_that_a_named_kernel_cannot_compute_are_refused(
    monkeypatch: pytest.MonkeyPatch, backend: str, dtype: torch.dtype, head_dim: int
) -> None:
    pretend(monkeypatch, 9)
    with pytest.raises(
        IncompatibleError, match=f"--attention {backend} cannot compute .* heads {head_dim} wide"
    ):
        choose_kernel(backend, GPU, dtype, head_dim)


@pytest.mark.parametrize(
    ("backend", "kind"),
    [("math", PlainKernel), ("plain", PlainKernel), ("torch", CpuKernel), ("flash", CpuKernel)],
)
def test_named_kernels_of_a_cpu(backend: str, kind: type[AttentionKernel]) -> None:
    assert type(choose_kernel(backend, CPU, torch.float32, 64)) is kind
