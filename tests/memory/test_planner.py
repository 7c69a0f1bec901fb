"""The planner: its arithmetic against a step walked tensor by tensor, its choices against the reference table."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from step_walk import Walk

from longlora_cli.errors import ResourceError, SettingsError
from longlora_cli.memory.cost import Setting, StepCost, squared_lengths
from longlora_cli.memory.machine import Machine
from longlora_cli.memory.plan import KINDS, STAGING_BYTES, LayerPlan, MemoryPlan, ModelShape, Prediction
from longlora_cli.memory.planner import describe, longest_context, make_plan
from longlora_cli.memory.roomy import roomy_context, roomy_plan

GIB = 2**30
LINEARS = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096), "mlp": (4096, 14336)}


def llama_8b(rank: int = 16, optimizer: float = 8.0) -> ModelShape:
    """Llama-3.1-8B in NF4 with double quantization (3.35 GiB), embedding and head in bf16 (1.96 GiB)."""
    sides = 32 * rank * (sum(a + b for a, b in LINEARS.values()) + 2 * (4096 + 14336))
    return ModelShape(
        32, 4096, 32, 8, 128, 14336, 128256, 2, int(5.31 * GIB), sides, rank,
        optimizer_bytes_per_parameter=optimizer,
    )  # fmt: skip


def card(gpu: float, host: float, disk: float = 0, tflops: float = 500) -> Machine:
    """Sizes in GiB; one rate for all computation, as the reference table has it."""
    rate = tflops * 1e12
    endless = float("inf")  # memory's own time is not in the table
    sizes = (int(gpu * GIB), int(host * GIB), int(disk * GIB))
    return Machine(*sizes, rate, rate, rate, memory_bytes_per_second=endless)


SMALL = ModelShape(6, 64, 4, 2, 16, 160, 512, 4, 10_000, 2_000, 4)


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    kv = draw(st.sampled_from([1, 2, 3, 4, 8]))
    embedding = draw(st.sampled_from([0, 0, 0, 2**24, 2**29]))
    heads, dim = kv * draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([8, 64, 128]))
    return ModelShape(
        draw(st.integers(1, 9)), draw(st.sampled_from([32, 96, 512])), heads, kv, dim,
        draw(st.sampled_from([64, 200, 1024])), draw(st.sampled_from([64, 2000])), draw(st.sampled_from([2, 4])),
        embedding + draw(st.integers(0, 10**6)), draw(st.integers(0, 10**5)), draw(st.integers(0, 16)),
        draw(st.sampled_from([("q_proj", "v_proj"), ("down_proj", "gate_proj", "o_proj")])),
        draw(st.sampled_from([0.0, 2.0, 8.0])), draw(st.sampled_from([2, 3])), embedding,
    )  # fmt: skip


def slow(gpu: int, host: int, disk: int) -> Machine:
    """A machine on which keeping and copying both cost something."""
    return Machine(gpu, host, disk, 1e12, 8e11, 7e11, 2e10, 2e9, multiprocessors=1)


BASE = 2**29 + 2**26 + 2**20  # what the context and the workspace take
RESERVE = 2 * GIB


def everything(shape: ModelShape, tokens: int) -> int:
    """Bytes of all that a step could keep."""
    return shape.layers * tokens * sum(shape.kept_bytes(kind) for kind in KINDS)


@dataclasses.dataclass(frozen=True)
class Problem:
    shape: ModelShape
    tokens: int
    gpu: float
    host: float
    disk: float

    def machine(self, more: tuple[float, float, float] = (1, 1, 1)) -> Machine:
        """Sizes as shares of what there is to keep, beside what a step holds in any case, all times `more`."""
        shape, keep = self.shape, everything(self.shape, self.tokens)
        running = keep // shape.layers + self.tokens * shape.kept_bytes("input") * 3
        fixed = BASE + int(shape.weight_bytes + 16 * shape.trainable) + running // 2
        fixed -= min(shape.embedding_bytes, running) // 2  # now and then the embedding is what does not fit
        gpu = int(1.02 * (fixed + self.gpu * keep) * more[0])
        wanted = self.host * keep + shape.embedding_bytes
        host = int(max(RESERVE + wanted, wanted / 0.95) * more[1])
        return slow(gpu, host, int(self.disk * keep * more[2]))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Where most plans must choose: some memory, but not for everything."""
    share = st.one_of(st.floats(0, 0.08), st.floats(0, 0.3), st.floats(0, 1.2))
    disk = draw(st.sampled_from([0.0, 0.0, 0.3]))
    return Problem(draw(shapes()), draw(st.integers(5_000, 200_000)), draw(share), draw(share), disk)


LARGER = st.tuples(*[st.floats(1, 2)] * 3)


def try_plan(shape: ModelShape, tokens: int, machine: Machine, **more: Any) -> MemoryPlan | None:
    try:
        return make_plan(shape, tokens, machine, **more)
    except ResourceError:
        return None


@settings(max_examples=8, deadline=None)
@given(problems(), st.integers(0, 1))
def test_the_prediction_is_what_a_walk_through_the_step_finds(problem: Problem, shifted: int) -> None:
    shape, tokens = problem.shape, problem.tokens
    plan = try_plan(shape, tokens, problem.machine(), shifted_group=shifted * 512)
    assume(plan is not None)
    assert plan is not None
    walk = Walk(plan, shape, squared_lengths([tokens], shifted * 512)).run()
    peak, predicted = walk.ledger.peak, plan.predicted
    dynamic = predicted.peak_gpu_bytes - 2**29 - 2**26
    walked = peak["gpu"] - 2**29 - 2**26
    assert walked <= dynamic + 1
    assert walked >= 0.9 * dynamic
    assert peak["disk"] <= predicted.disk_bytes + 1
    assert peak["host"] <= predicted.host_bytes + 1
    if not predicted.disk_bytes:
        assert peak["host"] >= 0.9 * predicted.host_bytes
    assert walk.flops == pytest.approx(predicted.hardware_flops, rel=1e-9)


PLACES = ("recompute", "gpu", "host", "disk")


def test_attention_computed_again_before_a_backward_counts_copies_of_its_operands() -> None:
    shape = ModelShape(
        1, 96, 4, 4, 8, 200, 64, 2, 1000, 0, 13, embedding_bytes=0, mlp_matrices=2
    )  # heads of their own and small tiles: the copies are the largest part
    nothing = Prediction(0, 0, 0, 0.0, 0.0, 0.0)
    layers = (LayerPlan("host", "recompute", "disk", "host"),)
    plan = MemoryPlan(2564, layers, "gpu", "gpu", 64, 16, 2, 0, nothing)
    cost = StepCost(shape, 2564, 2564.0**2, slow(1, 1, 1))
    predicted = cost.gpu_peak(np.array([[[2], [0], [3], [2]]]), Setting(64, 16, 2, 1, 1))[0]
    assert Walk(plan, shape, 2564.0**2).run().ledger.peak["gpu"] == pytest.approx(predicted, abs=1)


@settings(max_examples=150, deadline=None)
@given(shapes(), st.integers(1, 50_000), st.data())
def test_no_plan_at_all_takes_more_than_the_arithmetic_says(
    shape: ModelShape, tokens: int, data: st.DataObject
) -> None:
    alike = st.integers(0, 3).map(lambda place: [place] * shape.layers)
    mixed = st.lists(st.integers(0, 3), min_size=shape.layers, max_size=shape.layers)
    places = np.array([[data.draw(st.one_of(alike, mixed)) for _ in KINDS]])
    places[0, 0, 0] = max(places[0, 0, 0], 1)  # the first layer has nobody to be recomputed from
    inner = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    tile, loss = data.draw(st.sampled_from([(64, 16), (4096, 1024)]))
    heads = data.draw(st.sampled_from([h for h in range(shape.kv_heads) if not h or shape.kv_heads % h == 0]))
    setting = Setting(tile, loss, heads, *inner)
    cost = StepCost(shape, tokens, float(tokens) ** 2, slow(1, 1, 1))
    layers = tuple(LayerPlan(*(PLACES[p] for p in places[0, :, i])) for i in range(shape.layers))
    nothing = Prediction(0, 0, 0, 0.0, 0.0, 0.0)
    plan = MemoryPlan(tokens, layers, PLACES[inner[0]], PLACES[inner[1]], tile, loss, heads, 0, nothing)
    walk = Walk(plan, shape, float(tokens) ** 2).run()
    assert walk.ledger.peak["gpu"] <= cost.gpu_peak(places, setting)[0] + 1
    assert walk.ledger.peak["host"] <= cost.away_peak(places, setting, 2)[0] + 1
    assert walk.ledger.peak["disk"] <= cost.away_peak(places, setting, 3)[0] + 1
    assert walk.flops == pytest.approx(cost.seconds(places, setting)[1][0], rel=1e-9)


@pytest.mark.parametrize(
    ("kept", "inner"), [("gpu", "host"), ("host", "gpu"), ("host", "host"), ("gpu", "gpu")]
)
def test_what_a_group_moves_is_counted_once(kept: str, inner: str) -> None:
    places = np.zeros((1, 4, 6), int)
    places[0, 0, ::3] = places[0, 1] = PLACES.index(kept)
    code = PLACES.index(inner)
    cost = StepCost(SMALL, 100_000, 1e10, slow(1, 1, 1))
    layers = tuple(LayerPlan(*(PLACES[p] for p in places[0, :, i])) for i in range(6))
    nothing = Prediction(0, 0, 0, 0.0, 0.0, 0.0)
    plan = MemoryPlan(100_000, layers, inner, inner, 64, 16, 1, 0, nothing)  # type: ignore[arg-type]
    peak = Walk(plan, SMALL, 1e10).run().ledger.peak
    setting = Setting(64, 16, 1, code, code)
    assert cost.gpu_peak(places, setting)[0] - BASE == pytest.approx(peak["gpu"] - BASE, rel=0.02)
    assert cost.away_peak(places, setting, 2)[0] == pytest.approx(peak["host"], rel=0.02)


@settings(max_examples=5, deadline=None)
@given(problems(), LARGER)
def test_more_memory_is_never_slower(problem: Problem, more: tuple[float, float, float]) -> None:
    small = try_plan(problem.shape, problem.tokens, problem.machine())
    assume(small is not None)
    assert small is not None
    large = make_plan(problem.shape, problem.tokens, problem.machine(more))
    assert large.predicted.seconds <= small.predicted.seconds * (1 + 1e-12)


# Two KV heads: a call of one takes more than a call of both.
TWO_HEADS = ModelShape(1, 32, 2, 2, 8, 64, 64, 4, 0, 0, 0, ("q_proj",), 0.0, 2)


@settings(max_examples=4, deadline=None)
@example(Problem(TWO_HEADS, 5000, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
@given(problems(), LARGER)
def test_more_memory_is_never_shorter_and_longest_is_the_end_of_what_fits(
    problem: Problem, more: tuple[float, float, float]
) -> None:
    shape, machine = problem.shape, problem.machine()
    try:
        tokens = longest_context(shape, machine)
    except ResourceError:
        assert try_plan(shape, 256, machine) is None
        return
    assert tokens % 256 == 0
    assert try_plan(shape, tokens, machine) is not None
    assert try_plan(shape, tokens + 256, machine) is None
    assert longest_context(shape, problem.machine(more)) >= tokens


@settings(max_examples=6, deadline=None)
@given(problems())
def test_a_plan_stays_within_the_machine(problem: Problem) -> None:
    machine = problem.machine()
    plan = try_plan(problem.shape, problem.tokens, machine)
    assume(plan is not None)
    assert plan is not None
    assert plan.predicted.peak_gpu_bytes <= machine.gpu_bytes_for_step
    moved = plan.embedding_on_host * (problem.shape.embedding_bytes + STAGING_BYTES)
    assert plan.predicted.host_bytes + moved <= machine.host_bytes_for_activations
    assert plan.predicted.disk_bytes <= machine.disk_bytes
    assert list(itertools.chain(*plan.groups())) == list(range(problem.shape.layers))


MANY = {
    "walk": (test_the_prediction_is_what_a_walk_through_the_step_finds, (problems(), st.integers(0, 1))),
    "slower": (test_more_memory_is_never_slower, (problems(), LARGER)),
    "shorter": (test_more_memory_is_never_shorter_and_longest_is_the_end_of_what_fits, (problems(), LARGER)),
    "within": (test_a_plan_stays_within_the_machine, (problems(),)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MANY)
def test_what_holds_of_a_few_problems_holds_of_more(name: str) -> None:
    claim, drawn = MANY[name]
    settings(max_examples=25, deadline=None)(given(*drawn)(claim.hypothesis.inner_test))()


# The reference table: tokens, tokens/s at 500 TFLOP/s with a static working set of 56 KiB a token.
REFERENCE = {
    8192: 12_950,
    32768: 8_170,
    65536: 5_210,
    131072: 3_157,
    262144: 1_786,
    393216: 1_229,
    524288: 913,
    786432: 559,
    1048576: 402,
}


@pytest.mark.parametrize("tokens", REFERENCE)
def test_speeds_are_those_of_the_reference_table(tokens: int) -> None:
    plan = make_plan(llama_8b(), tokens, card(77, 126))
    assert tokens / plan.predicted.seconds == pytest.approx(REFERENCE[tokens], rel=0.07)


def test_at_8k_all_is_kept_on_an_80_gb_gpu() -> None:
    plan = make_plan(llama_8b(), 8192, card(77, 128))
    assert all(plan.kept(kind, "gpu") == 32 for kind in KINDS)
    assert plan.kv_heads_per_call == 0
    assert plan.predicted.host_bytes == 0
    assert plan.predicted.hardware_flops / plan.predicted.model_flops < 1.05


@pytest.mark.parametrize("tokens", [131072, 262144])
def test_at_128k_and_256k_no_attention_runs_twice(tokens: int) -> None:
    plan = make_plan(llama_8b(), tokens, card(77, 128))
    assert plan.kept("attention", "recompute") == 0
    assert plan.kept("input", "recompute") == 0


def test_at_a_million_tokens_layers_go_in_groups_of_four() -> None:
    plan = make_plan(llama_8b(), 2**20, card(77, 128))
    lengths = [len(group) for group in plan.groups()]
    assert lengths == [4] * 7 + [1] * 4  # the last group's forward is its recomputation
    keeps = [i for i, layer in enumerate(plan.layers) if layer.attention != "recompute"]
    assert keeps == list(range(32 - len(keeps), 32))
    assert 4 <= len(keeps) < 16
    assert plan.kv_heads_per_call == 1


def test_80_gb_and_118_gib_of_host_reach_a_million_tokens() -> None:
    shape, machine = llama_8b(rank=32), card(77, 118)
    assert longest_context(shape, machine) >= 2**20
    assert make_plan(shape, 2**20, machine).kv_heads_per_call == 1


@pytest.mark.parametrize(
    ("tokens", "gpu", "host", "disk"),
    [
        (2**15, 24, 56, 0),
        (2**17, 77, 128, 0),
        (2**19, 77, 64, 200),
        (786432, 77, 128, 0),
        (2**20, 77, 118, 0),
    ],
)
def test_the_walk_agrees_for_an_8b_model(tokens: int, gpu: float, host: float, disk: float) -> None:
    shape = llama_8b()
    plan = make_plan(shape, tokens, card(gpu, host, disk))
    walk = Walk(plan, shape, float(tokens) ** 2).run()
    for place, bytes_ in (("gpu", plan.predicted.peak_gpu_bytes), ("disk", plan.predicted.disk_bytes)):
        assert 0.97 * bytes_ <= walk.ledger.peak[place] <= bytes_ + 1
    # What goes to disk passes through two buffers of the host.
    buffers = 2 * tokens * shape.kept_bytes("attention") * bool(plan.predicted.disk_bytes)
    assert walk.ledger.peak["host"] == pytest.approx(plan.predicted.host_bytes - buffers, rel=0.03)
    assert walk.flops == pytest.approx(plan.predicted.hardware_flops, rel=1e-9)


# Caps in GiB, host in GiB, tokens to reach: 2.3 times what is published for each card. The 8 GB one needs 8-bit
# optimizer states: with float32 ones 6,656 tokens fit.
@pytest.mark.parametrize(
    ("gpu", "host", "tokens", "optimizer"),
    [
        (8, 24, 6_836, 2),
        (12, 24, 50_250, 8),
        (16, 28, 93_665, 8),
        (24, 56, 180_492, 8),
        (48, 56, 440_974, 8),
    ],
)
def test_smaller_cards_reach_their_lengths(gpu: int, host: int, tokens: int, optimizer: float) -> None:
    assert longest_context(llama_8b(32, optimizer), card(gpu, host)) >= tokens


# Seconds of a step on one H100 with FlashAttention-4, benchmarks/results.jsonl: (tokens, bytes of the card, seconds).
MEASURED = [
    (32768, 84.5e9, 3.68), (131072, 84.5e9, 34.87), (262144, 84.5e9, 122.19),
    (70400, 12e9, 15.30), (134912, 16e9, 45.34), (263424, 24e9, 152.79),
]  # fmt: skip


@pytest.mark.parametrize(("tokens", "gpu_bytes", "seconds"), MEASURED)
def test_the_planner_would_have_predicted_the_measured_steps_within_a_twentieth(
    tokens: int, gpu_bytes: float, seconds: float
) -> None:
    h100 = Machine(
        int(gpu_bytes),
        int(120.9 * GIB),
        attention_flops_forward=597e12,
        attention_flops_backward=638e12,
    )
    plan = roomy_plan(llama_8b(32, 0.0), tokens, h100)
    assert plan.predicted.seconds == pytest.approx(seconds, rel=0.05)


@pytest.mark.parametrize("tokens", [8192, 65536])
def test_shifted_attention_is_planned_in_halves_of_the_heads(tokens: int) -> None:
    plan = make_plan(llama_8b(32, 0.0), tokens, card(80, 120), shifted_group=2048)
    assert plan.kv_heads_per_call == 4


EMBEDDING_BYTES = 128256 * 4096 * 2


def movable(weight_gib: float = 5.75) -> ModelShape:
    """An 8B model with an input embedding of its own and a paged optimizer, by default a little heavier than in NF4."""
    shape = llama_8b(32, 0.0)
    return dataclasses.replace(shape, weight_bytes=int(weight_gib * GIB), embedding_bytes=EMBEDDING_BYTES)


EIGHT_GB = Machine(int(8e9), 100 * GIB)


def test_a_model_that_fills_8_gb_trains_only_with_its_embedding_on_the_host() -> None:
    with pytest.raises(ResourceError):
        longest_context(movable(), EIGHT_GB, explicit={"embedding": "gpu"})
    tokens = longest_context(movable(), EIGHT_GB)
    assert tokens == longest_context(movable(), EIGHT_GB, explicit={"embedding": "host"}) >= 16_384
    plan = make_plan(movable(), tokens, EIGHT_GB)
    assert plan.embedding_on_host
    rows = dict(describe(plan, movable(), EIGHT_GB))
    assert rows["input embedding"] == "host (1,002.0 MiB), rows are looked up there"
    shown = float(rows["host memory"].split(" ")[0])
    assert shown == pytest.approx(
        (plan.predicted.host_bytes + EMBEDDING_BYTES + STAGING_BYTES) / GIB, abs=0.06
    )


@pytest.mark.parametrize(("gpu", "tokens"), [(77, 8_192), (77, 131_072), (77, 2**20), (24, 32_768)])
def test_where_memory_is_not_short_the_embedding_stays_on_the_gpu(gpu: float, tokens: int) -> None:
    plan = make_plan(movable(), tokens, card(gpu, 120))
    assert not plan.embedding_on_host
    assert dict(describe(plan, movable(), card(gpu, 120)))["input embedding"] == "GPU (1,002.0 MiB)"


@pytest.mark.parametrize("place", ["gpu", "host"])
def test_a_fixed_place_of_the_embedding_is_kept_and_the_lookup_has_its_price(place: str) -> None:
    shape, machine = movable(), dataclasses.replace(card(77, 120), copy_bytes_per_second=5e9)
    plan = make_plan(shape, 8_192, machine, explicit={"embedding": place})
    assert plan.embedding_on_host == (place == "host")
    free = make_plan(dataclasses.replace(shape, embedding_bytes=0), 8_192, machine)
    added = plan.predicted.seconds - free.predicted.seconds
    rows = 8_192 * 4096 * 2
    wanted = rows / 7e9 + rows / (0.8 * 5e9) if place == "host" else 0.0
    assert added == pytest.approx(wanted)
    assert free.predicted.peak_gpu_bytes - plan.predicted.peak_gpu_bytes == pytest.approx(
        EMBEDDING_BYTES * (place == "host"), abs=1
    )


def test_a_card_that_just_holds_the_embedding_is_not_slower_than_one_that_just_does_not() -> None:
    smaller, larger = (Machine(int(gib * GIB), 100 * GIB) for gib in (7.66, 7.67))
    on_gpu = {"embedding": "gpu"}
    assert try_plan(movable(), 4096, smaller, explicit=on_gpu) is None
    tight = make_plan(movable(), 4096, larger, explicit=on_gpu)
    before, now = (make_plan(movable(), 4096, machine).predicted.seconds for machine in (smaller, larger))
    assert now <= before < tight.predicted.seconds / 2


def test_an_embedding_that_the_host_cannot_hold_stays_on_the_gpu() -> None:
    for spare, fits in ((-(2**20), False), (2**26, True)):
        # Enough for the table and the staging buffer beside the reserve of 2 GiB, or a little less.
        machine = Machine(int(8e9), RESERVE + EMBEDDING_BYTES + STAGING_BYTES + spare)
        assert (try_plan(movable(), 256, machine) is not None) == fits


def test_a_model_that_cannot_be_loaded_whole_is_not_planned_without_its_embedding() -> None:
    for weight_gib, fits in (
        (6.5, True),
        (6.7, False),
    ):  # 0.5 GiB of CUDA's and 0.31 of the adapter beside it
        shape = dataclasses.replace(movable(weight_gib), embedding_bytes=int(2.5 * GIB))
        assert (try_plan(shape, 256, EIGHT_GB) is not None) == fits
    with pytest.raises(ResourceError, match=r"GPU 7\.5 GiB of 7\.4 GiB") as refused:
        make_plan(shape, 256, EIGHT_GB)
    assert "The model alone" in (refused.value.hint or "")


def test_few_heads_in_a_call_are_chosen_only_for_memory() -> None:
    assert make_plan(llama_8b(), 8192, card(77, 64)).kv_heads_per_call == 0
    assert make_plan(llama_8b(), 8192, card(7.6, 64)).kv_heads_per_call == 1


def test_few_heads_in_a_call_are_slow_for_short_sequences_only() -> None:
    for tokens, least, most in ((8192, 1.1, 1.5), (2**18, 1.0, 1.01)):
        all_heads, one = (
            make_plan(
                llama_8b(), tokens, card(77, 128), explicit={"kv_heads_per_call": heads, "tile_tokens": 4096}
            )
            for heads in (0, 1)
        )
        assert least <= one.predicted.seconds / all_heads.predicted.seconds <= most


def test_copies_that_take_longer_than_computing_are_the_time_of_a_step() -> None:
    machine = dataclasses.replace(card(77, 128), copy_bytes_per_second=1e8, disk_bytes_per_second=1e12)
    fixed = {"group": 1, "offload": "host", "keep_attention": 0, "keep_qkv": 0, "keep_gate_up": 0}
    plan = make_plan(llama_8b(), 8192, machine, explicit=fixed)
    copied = 2 * 32 * 8192 * 8192  # every input, out and back
    assert plan.predicted.seconds == pytest.approx(copied / (0.8 * 1e8), rel=0.01)


def test_a_small_disk_is_not_overfilled() -> None:
    plan = make_plan(llama_8b(), 2**19, card(77, 64, 30))
    assert 16 * GIB <= plan.predicted.disk_bytes <= 30 * GIB


def test_what_stays_on_the_gpu_are_last_layers() -> None:
    plan = make_plan(llama_8b(), 262144, card(77, 128))
    for kind in ("input", "attention"):
        on_gpu = [i for i, layer in enumerate(plan.layers) if layer.place(kind) == "gpu"]
        assert on_gpu == list(range(32 - len(on_gpu), 32))
        assert 0 < len(on_gpu) < 32


def test_a_copy_that_computation_does_not_hide_is_not_made_if_recomputing_is_faster() -> None:
    fast, slow_link = (dataclasses.replace(card(30, 128), copy_bytes_per_second=r) for r in (1e12, 1e8))
    plan = make_plan(llama_8b(), 32768, fast)
    assert plan.kept("gate_up", "host") > 20
    assert make_plan(llama_8b(), 32768, slow_link).kept("gate_up", "host") == 0


def test_disk_is_used_only_where_there_is_one_and_the_host_is_short() -> None:
    shape, tokens = llama_8b(), 2**19
    without, with_disk = (make_plan(shape, tokens, card(77, 64, d)) for d in (0, 500))
    assert all(layer.place(kind) != "disk" for layer in without.layers for kind in KINDS)
    assert with_disk.predicted.disk_bytes > 0
    assert with_disk.predicted.seconds < without.predicted.seconds
    assert make_plan(shape, 32768, card(77, 128, 500)).predicted.disk_bytes == 0


def test_documents_lower_the_time_of_attention() -> None:
    shape, machine = llama_8b(), card(77, 128)
    one = make_plan(shape, 131072, machine)
    many = make_plan(shape, 131072, machine, documents=[8192] * 16)
    attention = 3.5 * 2 * 4096 * 32 * (131072**2 - 16 * 8192**2)
    assert one.predicted.model_flops - many.predicted.model_flops == pytest.approx(attention)
    assert many.predicted.seconds < one.predicted.seconds


@given(st.lists(st.integers(1, 90), min_size=1, max_size=4), st.sampled_from([2, 6, 16]))
def test_shifted_groups_are_counted_as_they_are_cut(documents: list[int], group: int) -> None:
    total = 0.0
    for tokens in documents:
        for shift in (0, group // 2):
            cut = [(i + shift) // group for i in range(tokens)]
            total += sum(cut.count(g) ** 2 for g in set(cut)) / 2
    assert squared_lengths(documents, group) == pytest.approx(total)


@pytest.mark.parametrize(
    ("explicit", "holds"),
    [
        ({"group": 2}, lambda p: [len(g) for g in p.groups()] == [2] * 2 + [1] * 2),
        ({"offload": "host"}, lambda p: p.kept("input", "gpu") == p.kept("input", "disk") == 0),
        ({"offload": "gpu"}, lambda p: p.kept("input", "host") == p.kept("input", "disk") == 0),
        ({"offload": "disk"}, lambda p: p.kept("input", "disk") > 0 == p.kept("input", "gpu")),
        (
            {"keep_attention": 2},
            lambda p: [x.attention != "recompute" for x in p.layers] == [0, 0, 0, 0, 1, 1],
        ),
        ({"keep_attention": False}, lambda p: p.kept("attention", "recompute") == 6),
        ({"keep_gate_up": 3}, lambda p: p.kept("gate_up", "recompute") == 3),
        ({"keep_qkv": True}, lambda p: p.kept("qkv", "recompute") == 0),
        ({"tile_tokens": 100}, lambda p: p.tile_tokens == 100),
        ({"loss_tile": 77}, lambda p: p.loss_tile == 77),
        ({"kv_heads_per_call": 1}, lambda p: p.kv_heads_per_call == 1),
        ({"kv_heads_per_call": 0}, lambda p: p.kv_heads_per_call == 0),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_what_the_user_fixed_is_so(explicit: dict[str, Any], holds: Any) -> None:
    machine = slow(BASE + 2**30, RESERVE + 2**30, 2**30)
    plan = make_plan(SMALL, 4096, machine, explicit=explicit)
    assert holds(plan)
    assert not holds(make_plan(SMALL, 4096, machine, explicit=OTHERWISE.get(str(explicit), {})))


# What the free choice is already; these must differ from another fixed one instead.
OTHERWISE = {
    str({"offload": "gpu"}): {"offload": "host"},
    str({"keep_qkv": True}): {"keep_qkv": False},
    str({"kv_heads_per_call": 0}): {"kv_heads_per_call": 1},
}


@pytest.mark.parametrize(
    "explicit",
    [
        {"grop": 4}, {"group": 0}, {"group": 7}, {"group": "4"}, {"offload": "cloud"}, {"offload": "disk"},
        {"keep_attention": 7}, {"keep_gate_up": -1}, {"tile_tokens": 0}, {"loss_tile": 0},
        {"kv_heads_per_call": 3}, {"kv_heads_per_call": -1}, {"tile_tokens": True}, {"embedding": "disk"},
        {"embedding": "host"},
    ],
    ids=str,
)  # fmt: skip
def test_what_no_plan_can_have_is_refused(explicit: dict[str, Any]) -> None:
    with pytest.raises(SettingsError) as refused:
        make_plan(SMALL, 64, slow(GIB, 4 * GIB, 0), explicit=explicit)
    key, value = next(iter(explicit.items()))
    assert key in refused.value.message or str(value) in refused.value.message


@pytest.mark.parametrize(("tokens", "documents"), [(0, None), (64, [65]), (64, [64, 0])])
def test_a_step_that_is_none_is_refused(tokens: int, documents: list[int] | None) -> None:
    with pytest.raises(SettingsError):
        make_plan(SMALL, tokens, slow(GIB, GIB, 0), documents=documents)


def test_what_does_not_fit_is_refused_with_need_supply_and_the_length_that_does() -> None:
    shape, machine = llama_8b(), card(24, 56)
    with pytest.raises(ResourceError) as refused:
        make_plan(shape, 2**20, machine)
    assert refused.value.exit_code == 5
    assert "1,048,576 tokens" in refused.value.message
    for part in ("GPU", "of 23.8 GiB", "host", "of 53.2 GiB", "disk"):
        assert part in refused.value.message
    assert f"{longest_context(shape, machine):,} tokens fit" in (refused.value.hint or "")


def test_a_model_that_is_too_large_is_said_to_be() -> None:
    with pytest.raises(ResourceError, match="GPU") as refused:
        longest_context(llama_8b(), card(4, 64))
    assert "The model alone" in (refused.value.hint or "")


def test_a_fixed_plan_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ResourceError):
        make_plan(llama_8b(), 2**20, card(77, 128), explicit={"group": 1})


def test_the_described_bytes_add_up_to_the_prediction() -> None:
    shape, machine = llama_8b(), card(77, 128)
    plan = make_plan(shape, 262144, machine)
    rows = dict(describe(plan, shape, machine))
    sizes = dict.fromkeys(("GPU", "host"), 0.0)
    layers = dict.fromkeys(KINDS, 0)
    for kind, value in zip(KINDS, [v for name, v in rows.items() if name.endswith(" kept")], strict=True):
        for part in value.split(", ") if value != "none" else []:
            where, count, amount = part.replace("(", "").split(" ")[:3]
            sizes[where] += float(amount)
            layers[kind] += int(count)
    assert sizes["host"] == pytest.approx(plan.predicted.host_bytes / GIB, abs=0.3)
    assert 0 < sizes["GPU"] < plan.predicted.peak_gpu_bytes / GIB
    assert layers == {kind: 32 - plan.kept(kind, "recompute") for kind in KINDS}
    speed = float(rows["speed"].split(" ")[0].replace(",", ""))
    assert speed * plan.predicted.seconds == pytest.approx(262144, rel=1e-3)
    assert float(rows["computation"].split(" ")[0]) == pytest.approx(500, rel=0.1)


def test_a_machine_measured_slower_predicts_longer_steps() -> None:
    shape, machine = llama_8b(), card(77, 128)
    first = make_plan(shape, 131072, machine).predicted.seconds
    again = make_plan(shape, 131072, machine.recalibrated({"seconds_ratio": 1.3})).predicted.seconds
    assert again == pytest.approx(1.3 * first, rel=0.02)


def test_planning_imports_no_torch() -> None:
    code = "import sys, longlora_cli.memory.planner; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_roomy_plan_leaves_the_allocator_some_memory_unless_only_a_full_one_fits() -> None:
    machine = card(40, 64)
    plan = roomy_plan(llama_8b(), 65_536, machine)
    assert plan.predicted.peak_gpu_bytes <= 0.97 * machine.gpu_bytes
    most = longest_context(llama_8b(), machine)
    assert roomy_plan(llama_8b(), most, machine) == make_plan(llama_8b(), most, machine)


@pytest.mark.parametrize("gpu", [8, 80])
def test_the_longest_context_to_train_at_leaves_the_allocator_some_memory(gpu: int) -> None:
    shape, machine = movable(), card(gpu, 120)
    tokens = roomy_context(shape, machine)
    left = machine.gpu_bytes - roomy_plan(shape, tokens, machine).predicted.peak_gpu_bytes
    assert left >= max(0.03 * machine.gpu_bytes, 384 * 2**20)
    assert tokens >= 0.75 * longest_context(shape, machine)


@pytest.mark.parametrize(("width", "tile"), [(576, 65_536), (4_096, 16_384)])
def test_narrow_models_take_more_tokens_in_a_tile(width: int, tile: int) -> None:
    shape = dataclasses.replace(llama_8b(), width=width, intermediate=width * 8 // 3)
    assert make_plan(shape, 131_072, card(77, 120)).tile_tokens == tile
