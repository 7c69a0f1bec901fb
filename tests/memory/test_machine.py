"""What the machine has: limits read from a temporary /proc and /sys, and from a stand-in for torch's memory calls."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from longlora_cli.errors import SettingsError
from longlora_cli.memory.machine import (
    CONTEXT_BYTES,
    Machine,
    disk_bytes_available,
    gpu_bytes_available,
    host_bytes_available,
)

GIB = 2**30


class Host:
    """A /proc and a /sys/fs/cgroup in a temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.cgroups = folder / "proc", folder / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        self.cgroups.mkdir()

    def kernel(self, available_gib: float) -> None:
        text = f"MemTotal: 999999999 kB\nMemFree: 1 kB\nMemAvailable: {int(available_gib * 2**20)} kB\n"
        (self.proc / "meminfo").write_text(text)

    def process_in(self, lines: str) -> None:
        (self.proc / "self" / "cgroup").write_text(lines)

    def group(self, path: str, limit: str, used: int, cached: int = 0, *, version: int = 2) -> None:
        folder = self.cgroups / path
        folder.mkdir(parents=True, exist_ok=True)
        names = {2: ("max", "current", ""), 1: ("limit_in_bytes", "usage_in_bytes", "total_")}[version]
        (folder / f"memory.{names[0]}").write_text(f"{limit}\n")
        (folder / f"memory.{names[1]}").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{names[2]}inactive_file {cached}\nslab 7\n")

    def available(self) -> int:
        return host_bytes_available(self.proc, self.cgroups)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    made = Host(tmp_path)
    made.kernel(100)
    return made


def test_without_cgroups_the_kernel_says(host: Host) -> None:
    assert host.available() == 100 * GIB


def test_a_cgroup_leaves_its_limit_less_use_plus_idle_cache(host: Host) -> None:
    host.process_in("0::/job\n")
    host.group("job", str(64 * GIB), 30 * GIB, 6 * GIB)
    assert host.available() == 40 * GIB


def test_the_tightest_parent_counts(host: Host) -> None:
    host.process_in("0::/outer/middle/job\n")
    host.group("outer/middle/job", str(64 * GIB), GIB)
    host.group("outer/middle", "max", GIB)
    host.group("outer", str(32 * GIB), 12 * GIB)
    assert host.available() == 20 * GIB


def test_the_kernel_counts_when_no_cgroup_is_tighter(host: Host) -> None:
    host.process_in("0::/job\n")
    host.group("job", str(500 * GIB), GIB)
    assert host.available() == 100 * GIB


def test_a_container_that_sees_its_own_cgroup_as_the_root_is_limited(host: Host) -> None:
    host.process_in("0::/host/path/that/is/not/mounted/here\n")
    host.group("", str(16 * GIB), 4 * GIB)
    assert host.available() == 12 * GIB


def test_version_1_is_read_where_the_memory_controller_is(host: Host) -> None:
    host.process_in("9:cpu,cpuacct:/elsewhere\n4:memory:/a/job\n0::/\n")
    host.group("memory/a/job", str(50 * GIB), 20 * GIB, 3 * GIB, version=1)
    host.group("memory/a", "9223372036854771712", 60 * GIB, version=1)
    host.group("memory", "9223372036854771712", 70 * GIB, version=1)
    assert host.available() == 33 * GIB


def test_a_cgroup_over_its_limit_leaves_nothing(host: Host) -> None:
    host.process_in("0::/job\n")
    host.group("job", str(GIB), 2 * GIB)
    assert host.available() == 0


def test_this_host_has_some_memory() -> None:
    assert 0 < host_bytes_available() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_disk_space_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    space = os.statvfs(tmp_path)
    found = disk_bytes_available(tmp_path / "not" / "yet" / "made")
    assert found == pytest.approx(space.f_bavail * space.f_frsize, rel=0.05)
    assert found > 0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 GiB of which 50 are free; torch holds 20 and uses 12 of them."""
    stand_in = {
        "mem_get_info": lambda device: (50 * GIB, 80 * GIB),
        "memory_reserved": lambda device: 20 * GIB,
        "memory_allocated": lambda device: 12 * GIB,
        "get_per_process_memory_fraction": lambda device: 1.0,
        "get_device_properties": lambda device: SimpleNamespace(
            name="NVIDIA A100-SXM4-80GB", multi_processor_count=108
        ),
    }
    for name, function in stand_in.items():
        monkeypatch.setattr(torch.cuda, name, function, raising=False)


@pytest.mark.usefixtures("gpu")
def test_a_gpu_has_what_is_free_and_what_torch_holds_unused() -> None:
    assert gpu_bytes_available(torch.device("cuda")) == 58 * GIB


@pytest.mark.usefixtures("gpu")
def test_a_gpu_is_limited_by_the_fraction_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_bytes_available(torch.device("cuda"), fraction=0.5) == 28 * GIB
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.25, raising=False)
    assert gpu_bytes_available(torch.device("cuda")) == 8 * GIB
    assert gpu_bytes_available(torch.device("cuda"), fraction=0.1) == 0


@pytest.mark.usefixtures("gpu")
def test_a_torch_that_does_not_tell_the_fraction_is_taken_to_have_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction")
    assert gpu_bytes_available(torch.device("cuda")) == 58 * GIB


@pytest.mark.usefixtures("gpu")
def test_a_machine_counts_loaded_weights_and_context_as_memory_for_training(tmp_path: Path) -> None:
    machine = Machine.detect("cuda", disk=tmp_path)
    assert machine.gpu_bytes == (58 + 12) * GIB + CONTEXT_BYTES
    assert machine.multiprocessors == 108
    assert machine.disk_bytes > 0
    assert machine.matmul_flops == pytest.approx(750e12 * 312 / 989)  # not taken for an A10
    assert Machine.detect("cuda", element_bytes=4).matmul_flops < machine.matmul_flops / 10


@pytest.mark.usefixtures("gpu")
def test_flash_attention_4_has_rates_of_its_own() -> None:
    usual, fa4 = Machine.detect("cuda"), Machine.detect("cuda", attention="fa4")
    assert fa4.attention_flops_backward / usual.attention_flops_backward == pytest.approx(638 / 525)
    assert fa4.attention_flops_forward / usual.attention_flops_forward == pytest.approx(597 / 575)
    assert fa4.matmul_flops == usual.matmul_flops


@pytest.mark.usefixtures("gpu")
def test_limits_lower_what_is_used_and_never_raise_it() -> None:
    machine = Machine.detect("cuda", gpu_limit_bytes=24 * GIB, host_limit_bytes=GIB)
    assert (machine.gpu_bytes, machine.host_bytes, machine.disk_bytes) == (24 * GIB, GIB, 0)
    assert Machine.detect("cuda", gpu_limit_bytes=2**50).gpu_bytes == 70 * GIB + CONTEXT_BYTES


def test_a_cpu_has_one_memory_in_two_halves() -> None:
    machine = Machine.detect("cpu")
    assert abs(machine.gpu_bytes - machine.host_bytes) <= 1
    assert machine.gpu_bytes + machine.host_bytes <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_the_host_keeps_a_reserve() -> None:
    assert Machine(0, 10 * GIB).host_bytes_for_activations == 8 * GIB
    assert Machine(0, 100 * GIB).host_bytes_for_activations == 95 * GIB
    assert Machine(0, GIB).host_bytes_for_activations == 0


def test_measured_rates_replace_assumed_ones_and_a_ratio_divides_them() -> None:
    machine = Machine(0, 0)
    again = machine.recalibrated({"seconds_ratio": 2.0, "copy_bytes_per_second": 1e10, "matmul_flops": 3e14})
    assert again.matmul_flops == 3e14
    assert again.attention_flops_forward == machine.attention_flops_forward / 2
    assert again.attention_flops_backward == machine.attention_flops_backward / 2
    assert again.memory_bytes_per_second == machine.memory_bytes_per_second / 2
    assert again.copy_bytes_per_second == 1e10
    assert again.disk_bytes_per_second == machine.disk_bytes_per_second


@pytest.mark.parametrize("measured", [{"speed": 1.0}, {"matmul_flops": 0.0}, {"seconds_ratio": float("nan")}])
def test_a_measurement_that_is_none_is_refused(measured: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match=next(iter(measured))):
        Machine(0, 0).recalibrated(measured)


@pytest.mark.parametrize("wrong", [{"gpu_bytes": -1}, {"host_bytes": -1}, {"matmul_flops": 0.0}])
def test_an_impossible_machine_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        Machine(**{"gpu_bytes": 1, "host_bytes": 1} | wrong)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_a_real_gpu_has_between_nothing_and_all_of_its_memory() -> None:
    device = torch.device("cuda", 0)
    machine = Machine.detect(device)
    total = torch.cuda.mem_get_info(device)[1]
    assert 0 < machine.gpu_bytes <= total + CONTEXT_BYTES
    assert gpu_bytes_available(device, fraction=0.1) <= 0.1 * total
