"""Sessions against the method spelled out, in float64 to rounding."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from beacon_reference import FAMILIES, Reference, loaded, tiny_model, with_beacons
from loop_kernel import Loops
from torch import Tensor

import longlora_cli.memory.attention as attention
from longlora_cli.beacon.session import BeaconSession
from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.beacon.weights import attach, detach
from longlora_cli.errors import IncompatibleError, IntegrityError, NumericError, SettingsError

EXACT = {"rtol": 1e-10, "atol": 1e-10}
IDS = [int(i) for i in torch.randint(3, 64, (37,), generator=torch.Generator().manual_seed(5))]
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
PLANS = {
    "interleaved": BeaconSettings(window=8, ratios=(4,)),
    "one beacon a token": BeaconSettings(window=8, ratios=(1,)),
    "one beacon a window": BeaconSettings(window=8, ratios=(8,)),
    "sink": BeaconSettings(window=8, ratios=(2,), sink=3),
    "sequence of ratios": BeaconSettings(window=8, ratios=(2, 0, 8), ratio_mix="sequence"),
    "sink and raw windows": BeaconSettings(window=8, ratios=(0, 4), ratio_mix="sequence", sink=2),
    "all projections": BeaconSettings(window=8, ratios=(4,), projections=("q", "k", "v", "o")),
    "no projections": BeaconSettings(window=8, ratios=(4,), projections=()),
    "appended": BeaconSettings(window=8, ratios=(4,), position="append"),
    "appended, apart": BeaconSettings(window=8, ratios=(2,), position="append", attend_prev=False, sink=1),
    "appended steps": BeaconSettings(window=8, ratios=(2,), position="append", attention="step-expansion"),
    "appended steps, apart": BeaconSettings(
        window=8, ratios=(2,), position="append", attention="step-expansion", attend_prev=False
    ),
    "appended segments": BeaconSettings(
        window=8, ratios=(2,), position="append", attention="segmentation", sink=1
    ),
    "interleaved steps": BeaconSettings(window=8, ratios=(2,), attention="step-expansion"),
    "interleaved steps, apart": BeaconSettings(
        window=8, ratios=(4,), attention="step-expansion", attend_prev=False, sink=2
    ),
    "interleaved segments": BeaconSettings(
        window=8, ratios=(2, 4), ratio_mix="sequence", attention="segmentation"
    ),
    "overlapping": BeaconSettings(window=8, stride=4, ratios=(2,), position="append", sink=1),
    "overlapping steps": BeaconSettings(
        window=8, stride=6, ratios=(3, 0), ratio_mix="sequence", position="append", attention="step-expansion"
    ),
}


def all_logits(model: Any, session: BeaconSession, ids: list[int]) -> Tensor:
    return model.lm_head(torch.cat(list(session.hidden_states(ids))))


def prepared(settings: BeaconSettings, family: str = "llama", **changes: Any) -> tuple[Any, BeaconSession]:
    model = tiny_model(family, **changes)
    with_beacons(model, settings)
    return model, BeaconSession(loaded(model), settings, generator=Random(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_of_each_family_has_the_logits_of_the_method_spelled_out(family: str) -> None:
    settings = PLANS["interleaved"]
    model, session = prepared(settings, family)
    torch.testing.assert_close(
        all_logits(model, session, IDS), Reference(model, settings, [4]).logits(IDS), **EXACT
    )


@pytest.mark.parametrize("name", PLANS)
def test_every_token_of_each_plan_has_the_logits_of_the_method_spelled_out(name: str) -> None:
    settings = PLANS[name]
    model, session = prepared(settings)
    expected = Reference(model, settings, settings.ratios).logits(IDS)
    torch.testing.assert_close(all_logits(model, session, IDS), expected, **EXACT)


def test_scaled_positions_are_turned_without_scaling_twice() -> None:
    settings = PLANS["interleaved"]
    model, session = prepared(settings, rope=YARN)
    assert model.model.rotary_emb.attention_scaling > 1.1
    expected = Reference(model, settings, [4]).logits(IDS)
    torch.testing.assert_close(all_logits(model, session, IDS), expected, **EXACT)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("cuts", [(1,), (3, 5, 7), (8,), (11, 2)])
def test_a_prompt_in_any_pieces_is_the_prompt_whole(name: str, cuts: tuple[int, ...]) -> None:
    settings = PLANS[name]
    _, session = prepared(settings)
    expected = session.fork().feed(IDS)
    start, turn = 0, 0
    while start < len(IDS):
        logits = session.feed(IDS[start : start + cuts[turn % len(cuts)]])
        start, turn = start + cuts[turn % len(cuts)], turn + 1
    torch.testing.assert_close(logits, expected, **EXACT)
    assert session.ids == IDS


@pytest.mark.parametrize("pieces", [[37], [5, 1, 13, 1, 17]])
@pytest.mark.parametrize("name", PLANS)
def test_a_fused_kernel_reads_a_batch_in_pieces_as_each_row_is_read_without_one(
    monkeypatch: pytest.MonkeyPatch, name: str, pieces: list[int]
) -> None:
    _, session = prepared(PLANS[name])
    rows = [IDS, IDS[::-1], IDS[3:]]
    expected = [session.fork().feed(row) for row in rows]
    monkeypatch.setattr(attention, "segment_kernel", lambda backend, query: Loops())
    session.reset()
    for stop, count in zip(accumulate(pieces), pieces, strict=True):
        found = session.feed([row[stop - count : stop] for row in rows])
    torch.testing.assert_close(found, torch.stack(expected), **EXACT)


@pytest.mark.parametrize("name", [name for name in PLANS if "overlapping" not in name])
@pytest.mark.parametrize("parallel", [2, 3, 9])
def test_windows_in_parallel_are_windows_in_turn(name: str, parallel: int) -> None:
    settings = PLANS[name]
    model, session = prepared(settings)
    expected, state = all_logits(model, session, IDS), session.memory
    together = BeaconSession(loaded(model), BeaconSettings(**{**vars(settings), "parallel": parallel}))
    found = all_logits(model, together, IDS[:5])
    found = torch.cat((found, all_logits(model, together, IDS[5:])))
    torch.testing.assert_close(found, expected, **EXACT)
    for one, other in zip(state.rows[0], together.memory.rows[0], strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_windows_in_parallel_take_fewer_forward_passes() -> None:
    settings = BeaconSettings(window=8, ratios=(4,), parallel=3)
    _, session = prepared(settings)
    assert [len(hidden) for hidden in session.hidden_states(IDS)] == [24, 13]


def test_appended_beacons_change_nothing_below_a_window() -> None:
    model = tiny_model()
    expected = model(input_ids=torch.tensor([IDS[:7]])).logits[0]
    settings = BeaconSettings(window=8, ratios=(4,), position="append")
    with_beacons(model, settings)
    found = all_logits(model, BeaconSession(loaded(model), settings), IDS[:7])
    assert torch.equal(found, expected)


def test_fresh_beacons_are_copies_of_the_projections_and_of_the_first_embedding() -> None:
    model = tiny_model("qwen2")
    projections = attach(model, BeaconSettings(embed_init="bos"), eos_token_id=2, bos_token_id=1)
    assert torch.equal(projections.beacon_embedding[0], model.model.embed_tokens.weight[1])
    for layer, copies in zip(model.model.layers, projections.layers, strict=True):
        for name in "qkv":
            own = getattr(layer.self_attn, f"{name}_proj")
            assert torch.equal(copies[name].weight, own.weight)
            assert torch.equal(copies[name].bias, own.bias)
            assert copies[name].weight.data_ptr() != own.weight.data_ptr()


@pytest.mark.parametrize("family", FAMILIES)
def test_ratio_0_is_full_attention(family: str) -> None:
    model = tiny_model(family)
    expected = model(input_ids=torch.tensor([IDS])).logits[0]
    session = BeaconSession(loaded(model), BeaconSettings(window=8, ratios=(0,), sink=2))
    torch.testing.assert_close(all_logits(model, session, IDS), expected, **EXACT)


@pytest.mark.parametrize("sink", [0, 1, 3])
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16, 23, 37])
def test_memory_holds_the_sink_the_beacons_and_the_unfinished_window(sink: int, tokens: int) -> None:
    _, session = prepared(BeaconSettings(window=8, ratios=(4,), sink=sink))
    session.feed(IDS[:tokens])
    stats = session.stats()
    closed, open_tokens = divmod(tokens, 8)
    assert stats.memory_rows == (sink if closed else 0) + closed * 2
    assert stats.open_rows == open_tokens + open_tokens // 4
    assert stats.raw_tokens == tokens
    assert stats.windows == closed
    assert stats.ratios == ((4,) * closed,)
    # 3 layers, keys and values, 2 KV heads of 8 numbers of 8 bytes
    assert stats.kv_bytes == (stats.memory_rows + stats.open_rows) * 3 * 2 * 2 * 8 * 8


def test_the_second_prompt_after_a_reset_is_a_fresh_session() -> None:
    model, session = prepared(PLANS["sink"])
    session.feed(IDS[:20])
    session.reset()
    fresh = BeaconSession(loaded(model), PLANS["sink"])
    assert torch.equal(session.feed(IDS[5:30]), fresh.feed(IDS[5:30]))
    assert session.ids == IDS[5:30]


def test_the_second_prompt_without_a_reset_continues_the_first() -> None:
    model, session = prepared(PLANS["sink"])
    session.feed(IDS[:20])
    expected = Reference(model, PLANS["sink"], [2]).logits(IDS)[-1]
    torch.testing.assert_close(session.feed(IDS[20:]), expected, **EXACT)


def test_two_sessions_on_one_model_do_not_meet() -> None:
    model, one = prepared(PLANS["interleaved"])
    other = BeaconSession(loaded(model), PLANS["interleaved"])
    expected = one.fork().feed(IDS)
    for start in range(0, 37, 5):
        other.feed(IDS[::-1][start : start + 5])
        logits = one.feed(IDS[start : start + 5])
    torch.testing.assert_close(logits, expected, **EXACT)


def test_a_fork_goes_its_own_way_with_the_same_ratios() -> None:
    settings = BeaconSettings(window=8, ratios=(2, 4, 8, 0))
    _, session = prepared(settings)
    session.feed(IDS[:12])
    fork = session.fork()
    expected = session.feed(IDS[12:])
    fork.fork().feed([9] * 25)
    assert torch.equal(fork.feed(IDS[12:]), expected)
    assert fork.stats() == session.stats()


def test_ids_may_be_a_list_an_array_or_a_tensor() -> None:
    _, session = prepared(PLANS["interleaved"])
    expected = session.fork().feed(IDS)
    array = np.array(IDS, dtype=np.int32)
    for ids in (array, torch.tensor(IDS), list(array)):
        assert torch.equal(session.fork().feed(ids), expected)
        assert torch.equal(session.fork().feed([ids])[0], expected)


def test_what_a_fork_draws_leaves_the_draws_of_its_origin_alone() -> None:
    settings = BeaconSettings(window=8, ratios=(1, 2, 4, 8))
    model, session = prepared(settings)
    untouched = BeaconSession(loaded(model), settings, generator=Random(0))
    session.feed(IDS[:3])
    fork = session.fork()
    fork.reset()
    fork.feed(IDS)
    session.feed(IDS[3:])
    untouched.feed(IDS)
    assert session.stats().ratios == untouched.stats().ratios


def test_a_step_is_a_feed_of_one_token() -> None:
    _, session = prepared(PLANS["interleaved"])
    session.feed(IDS[:10])
    fork = session.fork()
    assert torch.equal(session.step(IDS[10]), fork.feed([IDS[10]]))


@pytest.mark.parametrize("ids", [IDS[:21], [IDS[:21], IDS[:9]]])
def test_a_saved_session_goes_on_where_it_was(tmp_path: Path, ids: Any) -> None:
    settings = BeaconSettings(window=8, ratios=(2, 4, 8, 0), sink=1)
    model, session = prepared(settings)
    session.feed(ids)
    session.step(np.array([7, 8]) if isinstance(ids[0], list) else 7)
    session.save(tmp_path / "session")
    again = BeaconSession.load(tmp_path / "session", loaded(model))
    assert again.stats() == session.stats()
    assert again.ids == session.ids
    more = [IDS, IDS[3:]] if isinstance(ids[0], list) else IDS
    assert torch.equal(again.feed(more), session.feed(more))
    assert again.stats() == session.stats()


def test_a_session_of_other_weights_is_refused(tmp_path: Path) -> None:
    model, session = prepared(PLANS["interleaved"])
    session.feed(IDS)
    session.save(tmp_path / "session")
    model.model.beacon.layers[2]["v"].weight.data[0, 0] += 1
    with pytest.raises(IncompatibleError, match="other weights"):
        BeaconSession.load(tmp_path / "session", loaded(model))


def test_a_damaged_session_is_refused(tmp_path: Path) -> None:
    model, session = prepared(PLANS["interleaved"])
    session.feed(IDS)
    session.save(tmp_path / "session")
    (tmp_path / "session" / "session.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"session\.json"):
        BeaconSession.load(tmp_path / "session", loaded(model))


LEFT_PADDED = ([37, 30, 8, 1], [5, 5, 5, 5])


@pytest.mark.parametrize("lengths", LEFT_PADDED)
@pytest.mark.parametrize("name", ["interleaved", "sequence of ratios", "appended steps", "overlapping"])
def test_a_left_padded_batch_generates_what_each_row_generates_alone(lengths: list[int], name: str) -> None:
    model, batch = prepared(PLANS[name])
    rows = [IDS[n:] + IDS[:n] for n in range(4)]
    rows = [row[:length] for row, length in zip(rows, lengths, strict=True)]
    longest = max(lengths)
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    logits = batch.feed(ids, mask)
    alone = [BeaconSession(loaded(model), PLANS[name]) for _ in rows]
    expected = torch.stack([session.feed(row) for session, row in zip(alone, rows, strict=True)])
    for _ in range(10):
        torch.testing.assert_close(logits, expected, **EXACT)
        tokens = logits.argmax(-1).tolist()
        logits = batch.step(tokens)
        expected = torch.stack([session.step(token) for session, token in zip(alone, tokens, strict=True)])


def test_rows_of_a_batch_share_the_ratios_drawn_for_their_windows() -> None:
    _, session = prepared(BeaconSettings(window=8, ratios=(2, 4, 8)))
    session.feed([IDS, IDS[:30]])
    long, short = session.stats().ratios
    assert len(long) == 4
    assert long[:3] == short


@pytest.mark.parametrize(
    ("mask", "part"),
    [([1, 1, 0], "behind or between"), ([1, 0, 1], "behind or between"), ([0, 0, 0], "no token")],
)
def test_padding_that_breaks_a_window_is_refused(mask: list[int], part: str) -> None:
    _, session = prepared(PLANS["interleaved"])
    with pytest.raises(SettingsError, match=part):
        session.feed(torch.tensor([[4, 5, 6]]), torch.tensor([mask]))


def test_a_batch_cannot_change_its_rows() -> None:
    _, session = prepared(PLANS["interleaved"])
    session.feed([IDS[:3], IDS[:4]])
    with pytest.raises(SettingsError, match="1 rows for a session of 2"):
        session.feed([[5]])
    with pytest.raises(SettingsError, match="padding in a sequence that has begun"):
        session.feed(torch.tensor([[0, 5], [5, 5]]), torch.tensor([[0, 1], [1, 1]]))


def test_an_interrupted_pass_leaves_the_session_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, session = prepared(PLANS["interleaved"])
    session.feed(IDS[:13])
    expected = session.fork().feed(IDS[13:])
    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[1].mlp, "forward", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            session.feed(IDS[13:])
    assert session.ids == IDS[:13]
    assert torch.equal(session.feed(IDS[13:]), expected)


def _interrupt(*args: object) -> None:
    raise KeyboardInterrupt


def test_logits_that_are_no_numbers_are_refused() -> None:
    model, session = prepared(PLANS["interleaved"])
    model.model.embed_tokens.weight[7] = float("nan")
    with pytest.raises(NumericError):
        session.feed([7])


def test_the_model_computes_as_before_while_beacons_are_attached_and_after() -> None:
    model = tiny_model()
    ids = torch.tensor([IDS])
    names = [name for name, _ in model.named_parameters()]
    expected = model(input_ids=ids).logits
    with_beacons(model, PLANS["interleaved"])
    BeaconSession(loaded(model), PLANS["interleaved"]).feed(IDS)
    assert torch.equal(model(input_ids=ids).logits, expected)
    detach(model)
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert [name for name, _ in model.named_parameters()] == names
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_without_beacons_is_refused_unless_the_ratio_is_0() -> None:
    model = tiny_model()
    with pytest.raises(IncompatibleError, match="no beacons"):
        BeaconSession(loaded(model), PLANS["interleaved"])


def test_other_projections_than_the_attached_are_refused() -> None:
    model, _ = prepared(PLANS["interleaved"])
    with pytest.raises(IncompatibleError, match="projections q,k,v"):
        BeaconSession(loaded(model), PLANS["all projections"])


def test_several_ratios_need_a_generator() -> None:
    model, _ = prepared(PLANS["interleaved"])
    with pytest.raises(SettingsError, match="needs a generator"):
        BeaconSession(loaded(model), BeaconSettings(window=8, ratios=(2, 4)))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_length_are_refused(kind: str) -> None:
    model = tiny_model()
    model.config.rope_parameters = {"rope_type": kind, "rope_theta": 100.0, "factor": 2.0}
    with pytest.raises(IncompatibleError, match=f"{kind} positions"):
        BeaconSession(loaded(model), BeaconSettings(window=8, ratios=(0,)))


def test_a_memory_beyond_a_sliding_window_is_refused() -> None:
    model, session = prepared(PLANS["interleaved"], "mistral")
    for layer in model.model.layers:
        layer.self_attn.config.sliding_window = 12
    with pytest.raises(IncompatibleError, match="a model that sees 12"):
        session.feed(IDS)


def test_attention_that_knows_no_windows_is_refused() -> None:
    model = tiny_model()
    model.config._attn_implementation = "sdpa"
    with pytest.raises(IncompatibleError, match="sdpa attention"):
        BeaconSession(loaded(model), BeaconSettings(window=8, ratios=(0,)))
