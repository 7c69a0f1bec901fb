"""What goes into the arena comes out bit for bit, takes exactly its size, and leaves nothing behind."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longlora_cli.errors import ResourceError
from longlora_cli.memory.arena import HostArena
from longlora_cli.memory.pinned import PAGE_BYTES, Blocks, PinnedRange

CPU = torch.device("cpu")
MIB = 1 << 20
SHAPES = [(), (0,), (1,), (7, 3), (2, 1, 5, 3), (4097,)]
DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool,
    torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(shape, dtype=dtype).numel() * torch.empty((), dtype=dtype).element_size()
    data = torch.randint(
        0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8, generator=generator
    )
    return data.view(dtype).view(shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    def data(t: Tensor) -> Tensor:
        return t.contiguous().reshape(-1).view(torch.uint8)

    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(data(a), data(b))


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[HostArena]:
    with HostArena(CPU, MIB, disk=tmp_path, disk_bytes=MIB) as made:
        yield made


@pytest.mark.parametrize("place", ["gpu", "host", "disk"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape_comes_back_bit_for_bit(
    arena: HostArena, place: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = random_tensor(shape, dtype)
    other = arena.save(random_tensor(shape, dtype, seed=1), place=place)
    slot = arena.save(tensor, place=place)
    assert same_bits(arena.take(slot), tensor)
    assert same_bits(arena.take(other), random_tensor(shape, dtype, seed=1))


@pytest.mark.parametrize("place", ["host", "disk"])
def test_a_tensor_that_is_not_contiguous_comes_back_with_its_values(arena: HostArena, place: str) -> None:
    tensor = torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1)[1:, :, ::2]
    assert torch.equal(arena.take(arena.save(tensor, place=place)), tensor)
    conjugate = torch.tensor([1 + 2j, 3 - 1j]).conj()
    assert torch.equal(arena.take(arena.save(conjugate, place=place)), conjugate)


@pytest.mark.parametrize("place", ["host", "disk"])
def test_what_comes_back_is_a_tensor_of_its_own(arena: HostArena, place: str) -> None:
    tensor = torch.ones(10)
    slot = arena.save(tensor, place=place)
    arena.prefetch(slot)
    taken = arena.take(slot)
    arena.take(arena.save(torch.zeros(10), place=place))  # reuses the slot's memory
    assert torch.equal(taken, torch.ones(10))
    assert taken.data_ptr() != tensor.data_ptr()


def test_kept_on_the_gpu_is_the_tensor_itself_and_costs_no_host_memory(arena: HostArena) -> None:
    tensor = torch.ones(10)
    slot = arena.save(tensor, place="gpu")
    assert (arena.used_bytes, arena.disk_used_bytes) == (0, 0)
    assert arena.take(slot).data_ptr() == tensor.data_ptr()


def test_a_slot_ends_with_take_or_drop(arena: HostArena) -> None:
    slot = arena.save(torch.ones(3))
    arena.take(slot)
    arena.drop(slot)
    for call in (arena.take, arena.prefetch):
        with pytest.raises(RuntimeError, match="taken or dropped before"):
            call(slot)
    assert arena.used_bytes == 0


def test_freed_slots_are_used_again() -> None:
    with HostArena(CPU, 3 * PAGE_BYTES) as arena:
        for step in range(20):
            slots = [arena.save(torch.full((1024,), float(3 * step + i))) for i in range(3)]
            for i in (1, 0, 2):
                assert arena.take(slots[i])[0] == 3 * step + i
        assert arena.peak_bytes == 3 * PAGE_BYTES


def test_bytes_are_counted_to_the_page() -> None:
    with HostArena(CPU, 10 * PAGE_BYTES) as arena:
        first = arena.save(torch.zeros(PAGE_BYTES + 1, dtype=torch.uint8))
        second = arena.save(torch.zeros(PAGE_BYTES, dtype=torch.uint8))
        assert (arena.capacity_bytes, arena.used_bytes) == (10 * PAGE_BYTES, 3 * PAGE_BYTES)
        arena.drop(first)
        assert (arena.used_bytes, arena.peak_bytes) == (PAGE_BYTES, 3 * PAGE_BYTES)
        arena.take(second)
        assert (arena.used_bytes, arena.peak_bytes) == (0, 3 * PAGE_BYTES)


@pytest.mark.parametrize("place", ["host", "disk"])
def test_a_full_place_is_refused_with_numbers_and_stays_usable(tmp_path: Path, place: str) -> None:
    with HostArena(CPU, 4 * MIB, disk=tmp_path, disk_bytes=4 * MIB) as arena:
        kept = [arena.save(torch.full((MIB,), i, dtype=torch.uint8), place=place) for i in range(3)]
        with pytest.raises(
            ResourceError, match=rf"2.00 MiB of activations on the {place}: 1.00 MiB free of 4.00 MiB"
        ) as e:
            arena.save(torch.zeros(2 * MIB, dtype=torch.uint8), place=place)
        assert e.value.exit_code == 5
        assert e.value.hint
        last = arena.save(torch.full((MIB,), 3, dtype=torch.uint8), place=place)
        assert [int(arena.take(s)[-1]) for s in (*kept, last)] == [0, 1, 2, 3]


def test_reserving_more_than_the_capacity_is_refused() -> None:
    with HostArena(CPU, MIB) as arena:
        arena.reserve(MIB)
        with pytest.raises(ResourceError, match=r"no room for 1\.00 MiB"):
            arena.reserve(MIB + 1)


def test_an_unknown_place_and_a_disk_without_a_folder_are_refused() -> None:
    with HostArena(CPU, MIB) as arena:
        for place in ("nvme", "disk"):
            with pytest.raises(ValueError, match=f"place is '{place}'"):
                arena.save(torch.zeros(1), place=place)


def test_a_folder_without_the_space_is_refused_with_numbers(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"GiB free, 9313\d+\.\d+ GiB are needed"):
        HostArena(CPU, MIB, disk=tmp_path, disk_bytes=10**18)
    with pytest.raises(ResourceError, match="is not a folder"):
        HostArena(CPU, MIB, disk=tmp_path / "missing", disk_bytes=1)


def test_a_failed_write_to_disk_is_told_and_not_read_back(tmp_path: Path) -> None:
    with HostArena(CPU, MIB, disk=tmp_path, disk_bytes=MIB) as arena:
        assert arena._spill is not None
        read_only = os.open(tmp_path / "full", os.O_RDONLY | os.O_CREAT)
        os.dup2(read_only, arena._spill._file.fileno())
        with pytest.raises(ResourceError, match="could not be written to disk"):
            arena.take(arena.save(torch.ones(5), place="disk"))
        os.close(read_only)


operations = st.lists(
    st.tuples(
        st.sampled_from(["save", "save", "prefetch", "take", "drop"]),
        st.sampled_from(["host", "host", "gpu", "disk"]),
        st.integers(0, 3 * PAGE_BYTES),
        st.integers(0, 100),
    ),
    max_size=60,
)


@pytest.fixture(scope="module")
def shared_arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostArena]:
    with HostArena(
        CPU, 40 * PAGE_BYTES, disk=tmp_path_factory.mktemp("d"), disk_bytes=40 * PAGE_BYTES
    ) as made:
        yield made


@settings(max_examples=150, deadline=None)
@given(operations)
def test_any_sequence_of_calls_behaves_as_a_dictionary(
    shared_arena: HostArena, steps: list[tuple[str, str, int, int]]
) -> None:
    arena, live = shared_arena, []
    for number, (what, place, size, pick) in enumerate(steps):
        if what == "save":
            tensor = random_tensor((size,), torch.uint8, seed=number)
            try:
                live.append((arena.save(tensor, place=place), tensor))
            except ResourceError:
                assert (arena._blocks if place == "host" else arena._spill.blocks).largest_bytes < size
        elif live:
            slot, tensor = live[pick % len(live)]
            if what == "prefetch":
                arena.prefetch(slot)
                continue
            live.remove((slot, tensor))
            if what == "take":
                assert torch.equal(arena.take(slot), tensor)
            else:
                arena.drop(slot)
        wanted = {
            p: sum(-(-s.size_bytes // PAGE_BYTES) * PAGE_BYTES for s, _ in live if s.place == p)
            for p in ("host", "disk")
        }
        assert (arena.used_bytes, arena.disk_used_bytes) == (wanted["host"], wanted["disk"])
    for slot, tensor in live:
        assert torch.equal(arena.take(slot), tensor)
    assert arena._blocks.holes == [(0, 40 * PAGE_BYTES)]
    assert arena._spill.blocks.holes == [(0, 40 * PAGE_BYTES)]


@given(st.lists(st.integers(0, 5 * PAGE_BYTES), max_size=40), st.randoms(use_true_random=False))
def test_blocks_never_overlap_and_all_come_back(sizes: list[int], random: object) -> None:
    blocks = Blocks(64 * PAGE_BYTES)
    held: list[tuple[int, int]] = []
    for size in sizes:
        start = blocks.take(size)
        if start is None:
            assert blocks.largest_bytes < size
        elif size:
            assert start % PAGE_BYTES == 0
            assert all(start + size <= s or s + n <= start for s, n in held)
            held.append((start, size))
        if held and random.random() < 0.4:  # type: ignore[attr-defined]
            blocks.give(*held.pop(random.randrange(len(held))))  # type: ignore[attr-defined]
    for block in held:
        blocks.give(*block)
    assert blocks.holes == [(0, 64 * PAGE_BYTES)]


def resident_bytes() -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def mapped(address: int) -> bool:
    ranges = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) ", Path("/proc/self/maps").read_text(), re.MULTILINE)
    return any(int(a, 16) <= address < int(b, 16) for a, b in ranges)


def test_memory_is_used_only_as_far_as_it_is_needed_and_close_gives_it_back() -> None:
    data = torch.ones(
        64 * MIB, dtype=torch.uint8
    )  # perhaps in memory that an earlier test left to the process
    before = resident_bytes()
    arena = HostArena(CPU, 1 << 40)  # more than any machine here has
    assert resident_bytes() - before < 8 * MIB
    slot = arena.save(data)
    address = arena._range._start()
    assert mapped(address)
    assert resident_bytes() - before > 56 * MIB  # the copy
    del data
    arena.close()
    arena.close()
    assert not mapped(address)
    assert resident_bytes() - before < 16 * MIB
    with pytest.raises(RuntimeError, match="the arena was closed"):
        arena.take(slot)
    arena.drop(slot)


def test_an_arena_that_is_forgotten_gives_its_memory_back() -> None:
    arena = HostArena(CPU, MIB)
    address = arena._range._start()
    del arena
    gc.collect()
    assert not mapped(address)


def test_pieces_cover_a_block_without_crossing_an_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longlora_cli.memory.pinned.PIECE_BYTES", 2 * PAGE_BYTES)
    with HostArena(CPU, 16 * PAGE_BYTES) as arena:
        arena.save(torch.zeros(PAGE_BYTES, dtype=torch.uint8))
        tensor = random_tensor((5 * PAGE_BYTES + 3,), torch.uint8)
        slot = arena.save(tensor)
        assert [len(p) // PAGE_BYTES for p in arena._range.pieces(slot.offset, 6 * PAGE_BYTES)] == [
            1,
            2,
            2,
            1,
        ]
        assert torch.equal(arena.take(slot), tensor)


def test_a_disk_slot_larger_than_the_buffer_goes_through_it_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longlora_cli.memory.spill._BOUNCE_BYTES", 2 * PAGE_BYTES)
    with HostArena(CPU, PAGE_BYTES, disk=tmp_path, disk_bytes=16 * PAGE_BYTES) as arena:
        tensors = [random_tensor((5 * PAGE_BYTES + 3,), torch.uint8, seed=i) for i in range(2)]
        slots = [arena.save(t, place="disk") for t in tensors]
        assert all(torch.equal(arena.take(s), t) for s, t in zip(slots, tensors, strict=True))


def test_a_slot_that_is_dropped_in_the_middle_of_a_call_ends_with_the_next(arena: HostArena) -> None:
    slot = arena.save(torch.ones(5))
    with arena._lock:  # as when garbage collection runs inside a call
        arena.drop(slot)
        assert arena.used_bytes == PAGE_BYTES
    arena.take(arena.save(torch.ones(5)))
    assert arena.used_bytes == 0


LEFT = """
import os, sys, torch
from pathlib import Path
from longlora_cli.memory.arena import HostArena
folder = Path(sys.argv[2])
arena = HostArena(torch.device("cpu"), 1 << 20, disk=folder, disk_bytes=1 << 20)
slots = [arena.save(torch.ones(1000), place=p) for p in ("host", "disk", "disk")]
assert list(folder.iterdir()) == [], "the file has a name"
if sys.argv[1] == "error":
    raise ValueError("on purpose")
if sys.argv[1] == "killed":
    os.kill(os.getpid(), 9)
if sys.argv[1] == "fork":
    child = os.fork()
    if child == 0:
        try:
            arena.take(slots[0])
        except RuntimeError as error:
            assert "fork" in str(error), error
            arena.close()
            sys.exit(0)  # runs what is registered for the exit
        sys.exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert [float(arena.take(s)[-1]) for s in slots] == [1, 1, 1]
"""


@pytest.mark.parametrize(("how", "code"), [("exit", 0), ("error", 1), ("killed", -9), ("fork", 0)])
def test_nothing_remains_after_a_process_however_it_ends(tmp_path: Path, how: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEFT, how, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stderr
    assert ("ValueError: on purpose" in done.stderr) == (how == "error")
    assert done.stderr.count("Error") == (how == "error")
    assert list(tmp_path.iterdir()) == []


def test_a_context_manager_closes_after_an_exception() -> None:
    with pytest.raises(KeyError), HostArena(CPU, MIB) as arena:  # noqa: PT012 - the point is what follows
        address = arena._range._start()
        raise KeyError
    assert not mapped(address)


def test_a_range_the_system_does_not_have_is_refused() -> None:
    with pytest.raises(ResourceError, match="grants no range of"):
        PinnedRange(1 << 60, register=False)


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["host", "disk"])
def test_on_a_gpu_copies_keep_their_order_while_kernels_overwrite_freed_memory(
    tmp_path: Path, place: str
) -> None:
    gpu = torch.device("cuda")
    width, rounds, depth = 2048, 12, 8
    weight = torch.randn(width, width, device=gpu)
    with HostArena(
        gpu, (depth + 4) * width * width * 4, disk=tmp_path, disk_bytes=16 * width * width * 4
    ) as arena:
        for step in range(rounds):
            slots = []
            for i in range(depth):
                x = torch.full((width, width), float(step * depth + i), device=gpu)
                slots.append(arena.save(x, place=place))
                del x  # its memory is the next product's, as soon as the arena lets go of it
                for _ in range(3):
                    (weight @ weight).mul_(-1)
            order = range(depth - 1, -1, -1)
            for i in order:
                if i:
                    arena.prefetch(slots[i - 1])
                (weight @ weight).fill_(-1)
                taken = arena.take(slots[i])
                assert bool((taken == step * depth + i).all()), (step, i)
                taken.fill_(-2)
            dropped = arena.save(torch.ones(width, width, device=gpu), place=place)
            arena.prefetch(dropped)
            arena.drop(dropped)
        torch.cuda.synchronize()
        assert (arena.used_bytes, arena.disk_used_bytes) == (0, 0)


@pytest.mark.gpu
@pytest.mark.alone
def test_on_a_gpu_copies_run_at_more_than_20_gigabytes_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    gpu, size = torch.device("cuda"), 1 << 30
    tensors = [torch.randint(0, 255, (size,), dtype=torch.uint8, device=gpu) for _ in range(3)]
    with HostArena(gpu, 3 * size) as arena:
        start = time.perf_counter()
        arena.reserve(3 * size)
        registered = time.perf_counter() - start
        torch.cuda.synchronize()
        start = time.perf_counter()
        slots = [arena.save(t) for t in tensors]
        torch.cuda.synchronize()
        out_s = time.perf_counter() - start
        start = time.perf_counter()
        for slot in slots:
            arena.prefetch(slot)
        taken = [arena.take(slot) for slot in slots]
        torch.cuda.synchronize()
        back_s = time.perf_counter() - start
    assert all(torch.equal(a, b) for a, b in zip(taken, tensors, strict=True))
    out, back = 3 * size / out_s / 1e9, 3 * size / back_s / 1e9
    with capsys.disabled():
        sys.stdout.write(
            f"out {out:.1f} GB/s, back {back:.1f} GB/s, registered in {registered / 3:.2f} s/GiB\n"
        )
    assert min(out, back) > 20


@pytest.mark.gpu
def test_what_left_two_turns_ago_gives_its_memory_back_while_the_gpu_is_busy() -> None:
    device = torch.device("cuda", 0)
    with HostArena(device, 2**26) as arena:
        arena.reserve(2**25)
        before = torch.cuda.memory_allocated(device)
        torch.cuda._sleep(2 * 10**9)  # about a second: the CPU is far ahead of every copy below
        for _ in range(4):
            arena.next_turn()
            arena.save(torch.ones(2**20, device=device))
        arena.next_turn()
        held = torch.cuda.memory_allocated(device) - before
        torch.cuda.synchronize(device)
    assert held == 2**22  # the last one's


def test_a_write_to_disk_of_two_turns_ago_is_waited_for(tmp_path: Path) -> None:
    with HostArena(torch.device("cpu"), 2**20, disk=tmp_path, disk_bytes=2**20) as arena:
        slot = arena.save(torch.ones(2**10), place="disk")
        slow: Future[None] = Future()
        slot.saved = slow
        arena.next_turn()
        assert not slow.done()
        threading.Timer(0.2, slow.set_result, [None]).start()
        arena.next_turn()
        assert slow.done()
