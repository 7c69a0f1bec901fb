"""What memory and speed this machine has for a training step: GPU, host within its cgroups, disk.

MemAvailable alone is wrong in a container: the host's 1 TiB shows while the cgroup kills at 128 GiB. So every limit
from the process's own cgroup up to the root counts (v2 and v1; Linux, Documentation/admin-guide/cgroup-v2.rst). No
torch is imported until a device is asked for.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longlora_cli.errors import SettingsError

# What CUDA takes on the card beside torch's allocator: 0.45-0.55 GiB on an H100 with cuBLAS and cuDNN loaded.
CONTEXT_BYTES = 2**29
# For Python, torch and the tokenizer's data: 2 GiB, or a twentieth of a large machine.
HOST_RESERVE_BYTES = 2 * 2**30
_HOST_RESERVE_SHARE = 0.05
_GPU_RESERVE_SHARE = 0.01
_UNLIMITED = 2**60  # cgroup v1 writes about 2^63 for "no limit"

# Rates of the H100 80GB (SXM), measured with torch 2.11 and cuDNN 9.19: matmuls in MLP tiles of 8,192 tokens with
# dequantization 711 TFLOP/s, which the planner's own tile term takes from 750; causal attention of 32 query and 8
# key-value heads of 128 at 131,072 tokens 575 forward, 525 backward by cuDNN, 597 and 638 by FlashAttention-4; pinned
# copies 55 GB/s each way.
_H100 = (989e12, 750e12, 575e12, 525e12, 55e9)
_FA4_H100 = (597e12, 638e12)
# Dense 16-bit tensor FLOP/s (float32 accumulation) and bytes/s of the card's own memory as the makers' data sheets
# state them, and PCIe copies at about 85 % of the link. Where nothing was measured, the shares are the H100's.
_PEAKS: dict[str, tuple[float, float, float]] = {
    "H200": (989e12, 55e9, 4.8e12),
    "H100": (989e12, 55e9, 3.35e12),
    "B200": (2250e12, 55e9, 8e12),
    "A100": (312e12, 25e9, 2.04e12),
    "L40": (181e12, 25e9, 0.86e12),
    "A10": (125e12, 25e9, 0.6e12),
    "RTX 5090": (210e12, 50e9, 1.79e12),
    "RTX 4090": (165e12, 25e9, 1.01e12),
    "RTX 3090": (71e12, 25e9, 0.94e12),
    "T4": (65e12, 12e9, 0.32e12),
}
_UNKNOWN_GPU = (100e12, 12e9, 0.5e12)
# Two cores of a server: for tests and for the embedded model, where only ratios matter.
_CPU_FLOPS = 5e10
_CPU_COPY_BYTES_PER_SECOND = 5e9
_CPU_MEMORY_BYTES_PER_SECOND = 1e10
_FLOAT32_SHARE = 1 / 15  # of the 16-bit peak: 67 against 989 TFLOP/s on an H100 without TF32
_DISK_BYTES_PER_SECOND = 2e9  # an NVMe's sustained writes
_COMPUTE_RATES = (
    "matmul_flops",
    "attention_flops_forward",
    "attention_flops_backward",
    "memory_bytes_per_second",
)
_RATES = (
    *_COMPUTE_RATES,
    "copy_bytes_per_second",
    "disk_bytes_per_second",
)


@dataclass(frozen=True)
class Machine:
    """Memory that a training step may use, and rates to predict its time with.

    Args:
        gpu_bytes: GPU memory for all of training: weights, adapter and CUDA context included.
        host_bytes: Host memory that can still be had; the planner leaves a reserve of it for the process.
        disk_bytes: Disk space for activations; 0 uses none.
        matmul_flops: FLOP/s of large 16-bit matrix products.
        attention_flops_forward: FLOP/s of causal attention, counted as half of the full square.
        attention_flops_backward: The same for its backward pass.
        copy_bytes_per_second: Between GPU and host, each way at the same time.
        disk_bytes_per_second: Of reading and of writing.
        multiprocessors: Of the GPU: how much attention in one call keeps it busy; 0 when any does.
        memory_bytes_per_second: Of the GPU's own memory, by its data sheet.

    Raises:
        SettingsError: A negative size, or a rate that is not positive.
    """

    gpu_bytes: int
    host_bytes: int
    disk_bytes: int = 0
    matmul_flops: float = _H100[1]
    attention_flops_forward: float = _H100[2]
    attention_flops_backward: float = _H100[3]
    copy_bytes_per_second: float = _H100[4]
    disk_bytes_per_second: float = _DISK_BYTES_PER_SECOND
    multiprocessors: int = 132
    memory_bytes_per_second: float = _PEAKS["H100"][2]

    def __post_init__(self) -> None:
        for name in ("gpu_bytes", "host_bytes", "disk_bytes", "multiprocessors"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} is {getattr(self, name)}", rule="It must be at least 0.")
        for name in _RATES:
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} is {getattr(self, name)}", rule="It must be more than 0.")

    @classmethod
    def detect(
        cls,
        device: Any,
        *,
        gpu_limit_bytes: int | None = None,
        host_limit_bytes: int | None = None,
        disk: Path | None = None,
        element_bytes: int = 2,
        attention: str = "cudnn",
    ) -> Machine:
        """Look at this machine.

        Args:
            device: A torch device. A CPU has one memory, of which half counts as the GPU's and half as the host's.
            gpu_limit_bytes: Use at most this much GPU memory.
            host_limit_bytes: Use at most this much host memory.
            disk: Folder on a disk for activations; None uses none.
            element_bytes: Bytes of the compute type; 4 lowers the rates.
            attention: Kernel of long documents: `fa4` has rates of its own, for all others the card's usual best
                counts, which is cuDNN on Hopper.

        Raises:
            SettingsError: A limit is negative.
        """
        import torch

        device = torch.device(device)
        host, processors = host_bytes_available(), 0
        if device.type == "cuda":
            gpu = gpu_bytes_available(device) + torch.cuda.memory_allocated(device) + CONTEXT_BYTES
            facts = torch.cuda.get_device_properties(device)
            peak, copy, memory = _peak_of(facts.name)
            processors = facts.multi_processor_count
            unit = peak / _H100[0] * (_FLOAT32_SHARE if element_bytes > 2 else 1.0)
            attends = _FA4_H100 if attention == "fa4" else _H100[2:4]
            matmul, forward, backward = (rate * unit for rate in (_H100[1], *attends))
        else:
            gpu = host // 2
            host -= gpu
            matmul = forward = backward = _CPU_FLOPS
            copy, memory = _CPU_COPY_BYTES_PER_SECOND, _CPU_MEMORY_BYTES_PER_SECOND
        return cls(
            gpu if gpu_limit_bytes is None else min(gpu, gpu_limit_bytes),
            host if host_limit_bytes is None else min(host, host_limit_bytes),
            0 if disk is None else disk_bytes_available(disk),
            matmul_flops=matmul,
            attention_flops_forward=forward,
            attention_flops_backward=backward,
            copy_bytes_per_second=copy,
            multiprocessors=processors,
            memory_bytes_per_second=memory,
        )

    @property
    def gpu_bytes_for_step(self) -> int:
        """GPU memory less what the allocator loses between blocks of different sizes."""
        return int((1 - _GPU_RESERVE_SHARE) * self.gpu_bytes)

    @property
    def host_bytes_for_activations(self) -> int:
        """Host memory less the reserve for the process."""
        reserve = max(HOST_RESERVE_BYTES, int(_HOST_RESERVE_SHARE * self.host_bytes))
        return max(self.host_bytes - reserve, 0)

    def recalibrated(self, measured: Mapping[str, float]) -> Machine:
        """The same machine with rates from a real step.

        Args:
            measured: Rates by their field names, in FLOP/s or bytes/s; or `seconds_ratio`, measured over predicted
                seconds of a step, which divides all rates of computation.

        Raises:
            SettingsError: A key that is neither, or a value that is not positive.
        """
        known = {*_RATES, "seconds_ratio"}
        for name, value in measured.items():
            if name not in known:
                raise SettingsError(f"unknown measurement {name}", rule=f"Known: {', '.join(sorted(known))}.")
            if not value > 0:
                raise SettingsError(f"{name} is {value}", rule="It must be more than 0.")
        ratio = measured.get("seconds_ratio", 1.0)
        rates = {name: getattr(self, name) / ratio for name in _COMPUTE_RATES}
        return replace(self, **rates | {n: v for n, v in measured.items() if n != "seconds_ratio"})


def _peak_of(name: str) -> tuple[float, float, float]:
    for chip in sorted(_PEAKS, key=len, reverse=True):  # "A100" before "A10"
        if chip in name:
            return _PEAKS[chip]
    return _UNKNOWN_GPU


def gpu_bytes_available(device: Any, fraction: float | None = None) -> int:
    """GPU memory that torch's allocator can still give, what it holds unused included.

    Args:
        device: A CUDA device.
        fraction: Share of the card that this process may use; default: what
            `torch.cuda.set_per_process_memory_fraction` was last given, where torch tells.
    """
    import torch

    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    unused = torch.cuda.memory_reserved(device) - allocated
    if fraction is None:
        ask = getattr(torch.cuda, "get_per_process_memory_fraction", None)
        fraction = 1.0 if ask is None else float(ask(device))
    return max(min(free + unused, int(fraction * total) - allocated), 0)


def disk_bytes_available(folder: Path) -> int:
    """Free space for this user on the disk that holds `folder`, or its nearest parent that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def host_bytes_available(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Host memory that can still be had: the least of what the kernel and each cgroup leave.

    RLIMIT_MEMLOCK is not among them: CUDA's driver pins pages itself and does not count them there, and its usual 8 MiB
    would forbid ordinary users what works for them.

    Args:
        proc: Where procfs is mounted.
        cgroups: Where cgroups are mounted.
    """
    return max(min([*_kernel(proc), *_cgroup_limits(proc, cgroups)]), 0)


def _kernel(proc: Path) -> list[int]:
    for line in _read(proc / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return [int(line.split()[1]) * 1024]
    return [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]  # not Linux: what is built in


def _cgroup_limits(proc: Path, cgroups: Path) -> Iterator[int]:
    """What each cgroup over this process leaves; file pages that nobody used lately count as free."""
    for line in _read(proc / "self" / "cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Inside a container the path may be the host's; then only the root of the mount is ours.
        here = root / path.lstrip("/")
        for folder in (here, *here.parents):
            if folder.is_relative_to(root):
                yield from _left_in(folder, *names)


def _left_in(folder: Path, limit_name: str, used_name: str, cached_name: str) -> Iterator[int]:
    limit, used = _read(folder / limit_name).strip(), _read(folder / used_name).strip()
    if not limit.isdigit() or not used.isdigit() or int(limit) >= _UNLIMITED:
        return  # no such file, or "max"
    words = _read(folder / "memory.stat").split()
    facts = dict(zip(words[::2], words[1::2], strict=False))
    yield int(limit) - int(used) + int(facts.get(cached_name, 0))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
