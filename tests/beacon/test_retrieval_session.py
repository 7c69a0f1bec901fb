"""Retrieved spans at the fine level: against the method spelled out, bit for bit where nothing may change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from beacon_reference import Reference, loaded, tiny_model, with_beacons
from torch import Tensor

from longlora_cli.beacon.retrieval import RetrievalSettings, Span
from longlora_cli.beacon.retrieval_session import RetrievalSession, open_session, split_levels
from longlora_cli.beacon.session import BeaconSession
from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.errors import IntegrityError, SettingsError

EXACT = {"rtol": 1e-10, "atol": 1e-10}
IDS = [int(i) for i in torch.randint(3, 64, (42,), generator=torch.Generator().manual_seed(5))]
QUESTION = [7, 9]
ALL = [Span(0, len(IDS))]
PLANS = {
    "interleaved": BeaconSettings(window=8, ratios=(4,)),
    "sink": BeaconSettings(window=8, ratios=(4,), sink=3),
    "sequence of ratios": BeaconSettings(window=8, ratios=(4, 8), ratio_mix="sequence"),
    "appended": BeaconSettings(window=8, ratios=(4,), position="append", sink=1),
    "appended steps": BeaconSettings(window=8, ratios=(4,), position="append", attention="step-expansion"),
    "interleaved segments": BeaconSettings(window=8, ratios=(4,), attention="segmentation"),
    "overlapping": BeaconSettings(window=8, stride=4, ratios=(4,), position="append", sink=1),
    "parallel": BeaconSettings(window=8, ratios=(4,), parallel=3),
}


class Words:
    """A tokenizer for ids 0 to 63: each is a word of its own."""

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        """`w7 w9 ...`."""
        return " ".join(f"w{i}" for i in ids)


BM25 = RetrievalSettings("bm25", topk=2, key_length=4)


def opened(
    settings: BeaconSettings, *, fine_ratio: int = 0, retrieval: RetrievalSettings = BM25, **more: Any
) -> tuple[Any, RetrievalSession]:
    model = tiny_model()
    with_beacons(model, settings)
    usable = replace(loaded(model), tokenizer=Words())
    return model, RetrievalSession(usable, settings, retrieval, fine_ratio=fine_ratio, **more)


class Keeping(Reference):
    """Remembers the unrotated rows of the window that it ran last."""

    own: list[list[tuple[Tensor, Tensor]]]

    def _window(self, *args: Any) -> Tensor:
        self.own = []
        return super()._window(*args)

    def _layer(self, *args: Any) -> Any:
        hidden, own = super()._layer(*args)
        self.own.append(own)
        return hidden, own


def everything(session: BeaconSession) -> list[Tensor]:
    return [tensor for rows in session.memory.rows[0] if rows is not None for tensor in rows]


def same_bits(first: BeaconSession, second: BeaconSession) -> bool:
    pairs = zip(everything(first), everything(second), strict=True)
    return first.cursors == second.cursors and all(torch.equal(one, other) for one, other in pairs)


def spelled_out(model: Any, settings: BeaconSettings, fine_ratio: int, spans: list[Span]) -> Tensor:
    """Logits of the question: both levels of each window by hand, then one list of rows, then the question.

    The spans lie on whole beacons of both levels.
    """
    hop, held = settings.hop, {t for span in spans for t in range(span.start, span.end)}
    coarse = Keeping(model, settings, settings.ratios)
    fine = Reference(model, settings, [fine_ratio])
    layers = range(len(coarse.memory))
    mixed: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
    windows = list(coarse._windows(IDS))
    for number, (ratio, old, new, closes) in enumerate(windows):
        before = [list(rows) for rows in coarse.memory]
        if not closes:
            break
        fine.memory, fine.stay = [list(rows) for rows in before], [list(rows) for rows in coarse.stay]
        fine._window(number, fine_ratio, old, new, True)
        coarse._window(number, ratio, old, new, True)
        for layer in layers:
            rows = {
                r: m.memory[layer][len(before[layer]) :] for r, m in ((ratio, coarse), (fine_ratio, fine))
            }
            sink = settings.sink if number == 0 else 0
            mixed[layer] += rows[ratio][:sink]
            token = 0
            while token < hop:
                of = fine_ratio if number * hop + token in held else ratio
                if of:
                    mixed[layer].append(rows[of][sink + token // of])
                elif token >= sink:
                    mixed[layer].append(rows[of][token])
                token += max(of, 1)
    number = sum(closes for *_, closes in windows)
    ratio, old, opened_ids, _ = windows[number]
    coarse._window(number, ratio, old, opened_ids, False)  # the open rows were read behind the coarse memory
    coarse.memory, coarse.stay = mixed, coarse.own
    return coarse._window(number, ratio, old + len(opened_ids), QUESTION, False)[-1]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(
    ("fine_ratio", "spans"),
    [(0, [Span(8, 16)]), (2, [Span(0, 8), Span(24, 32)]), (0, [Span(0, 40)])],
    ids=["one raw span", "two finer spans", "all raw"],
)
def test_an_answer_over_retrieved_spans_has_the_logits_of_the_method_spelled_out(
    name: str, fine_ratio: int, spans: list[Span]
) -> None:
    settings = PLANS[name]
    model, session = opened(settings, fine_ratio=fine_ratio)
    session.feed(IDS)
    answer = session.with_fine(spans).feed(QUESTION)
    torch.testing.assert_close(answer, spelled_out(model, settings, fine_ratio, spans), **EXACT)


@pytest.mark.parametrize(
    "name", [n for n, plan in PLANS.items() if plan.ratios == (4,) and plan.parallel == 1]
)
def test_a_fine_level_of_the_same_ratio_gives_the_plain_memory_bit_for_bit(name: str) -> None:
    _, session = opened(PLANS[name], fine_ratio=4)
    session.feed(IDS)
    plain = BeaconSession(session.loaded, PLANS[name])
    plain.feed(IDS)
    swapped = session.with_fine(ALL)
    assert session.stats().fine_windows == session.stats().windows > 3
    assert same_bits(swapped, plain)
    assert torch.equal(swapped.feed(QUESTION), plain.feed(QUESTION))


def test_windows_read_in_parallel_give_the_same_fine_level_to_rounding() -> None:
    _, session = opened(PLANS["parallel"], fine_ratio=4)
    session.feed(IDS)
    torch.testing.assert_close(everything(session.with_fine(ALL)), everything(session), **EXACT)


@pytest.mark.parametrize("sink", [0, 3])
def test_one_raw_window_is_full_attention_over_its_tokens(sink: int) -> None:
    settings = BeaconSettings(window=8, ratios=(4,), sink=sink, attention="step-expansion")
    _, session = opened(settings)
    session.feed(IDS[:8])
    full = BeaconSession(session.loaded, BeaconSettings(window=8, ratios=(0,)))
    full.feed(IDS[:8])
    torch.testing.assert_close(session.with_fine(ALL).feed(QUESTION), full.feed(QUESTION), **EXACT)


def test_later_raw_windows_are_full_attention_in_the_first_layer_and_not_above_it() -> None:
    # Above it they differ rightly: a window is read behind the beacons of those before it, not behind their tokens.
    _, session = opened(PLANS["interleaved"])
    session.feed(IDS[:40])
    full = BeaconSession(session.loaded, BeaconSettings(window=8, ratios=(0,)))
    full.feed(IDS[:40])
    raw = session.with_fine(ALL)
    assert raw.cursors == full.cursors
    first, *above = zip(raw.memory.rows[0], full.memory.rows[0], strict=True)
    torch.testing.assert_close(*first, **EXACT)
    for one, other in above:
        torch.testing.assert_close(
            one.keys[:, :8], other.keys[:, :8], **EXACT
        )  # nothing was before the first window
        assert (one.keys[:, 8:] - other.keys[:, 8:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", PLANS)
def test_after_an_answer_the_session_holds_what_it_held_and_goes_on_as_if_never_asked(name: str) -> None:
    _, session = opened(PLANS[name])
    session.feed(IDS)
    untouched = BeaconSession(session.loaded, PLANS[name])
    untouched.feed(IDS)
    answering = session.with_fine([Span(8, 24)])
    answering.feed(QUESTION)
    for token in range(20, 40):  # several windows close while it answers
        answering.step(token)
    assert answering.cursors[0].windows > session.cursors[0].windows
    assert same_bits(session, untouched)
    assert torch.equal(session.feed(QUESTION), untouched.feed(QUESTION))
    assert same_bits(session, untouched)


@pytest.mark.parametrize("name", PLANS)
def test_the_fine_level_is_the_same_bits_whenever_it_is_run(name: str) -> None:
    _, early = opened(PLANS[name], eager=True)
    early.feed(IDS)
    late = RetrievalSession(early.loaded, PLANS[name], BM25)
    late.feed(IDS)
    assert early.stats().fine_windows == early.stats().windows
    assert same_bits(early.with_fine([Span(2, 20)]), late.with_fine([Span(2, 20)]))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("eager", [False, True])
def test_a_prompt_in_pieces_gives_the_retrieved_memory_of_the_prompt_whole(name: str, eager: bool) -> None:
    _, whole = opened(PLANS[name], eager=eager)
    pieces = whole.fork()
    whole.feed(IDS)
    for start in range(0, len(IDS), 5):
        pieces.feed(IDS[start : start + 5])
    one, other = (session.with_fine([Span(4, 12), Span(30, 33)]) for session in (whole, pieces))
    assert one.cursors == other.cursors
    torch.testing.assert_close(everything(one), everything(other), **EXACT)


def test_retrieved_rows_stand_in_order_at_compact_positions() -> None:
    _, session = opened(PLANS["sink"])
    session.feed(IDS)
    assert session.cursors[0].memory == 3 + 5 * 2
    swapped = session.with_fine([Span(0, 4), Span(17, 18)])  # widened to tokens 16 to 19
    # Sink 3, token 3 raw, beacon of 4-7, 2 beacons of the second window, 4 raw tokens, then 1 + 2 + 2 beacons.
    assert swapped.cursors[0].memory == 3 + 1 + 1 + 2 + 4 + 1 + 4
    assert swapped.stats().open_rows == session.stats().open_rows == 2
    values = [rows.values for rows in session.memory.rows[0] if rows is not None]
    for layer, rows in enumerate(r for r in swapped.memory.rows[0] if r is not None):
        kept = [*range(3), 4, 5, 6, *range(11, 18)]  # what was not swapped, the open rows at the end
        coarse = [*range(3), 4, 5, 6, 8, 9, 10, 11, 12, 13, 14]
        assert torch.equal(rows.values[:, kept], values[layer][:, coarse])


def test_only_asked_windows_take_host_memory_and_stats_tell_its_bytes() -> None:
    _, session = opened(PLANS["interleaved"])
    session.feed(IDS)
    assert (session.stats().fine_windows, session.stats().fine_bytes) == (0, 0)
    kv_bytes = session.stats().kv_bytes
    session.with_fine([Span(9, 10), Span(26, 27)])
    window_bytes = 3 * 2 * 2 * 8 * 8 * 8  # layers, keys and values, KV heads, rows, head_dim, float64
    assert (session.stats().fine_windows, session.stats().fine_bytes) == (2, 2 * window_bytes)
    assert session.stats().kv_bytes == kv_bytes
    session.with_fine([Span(9, 10)])
    assert session.stats().fine_windows == 2
    session.reset()
    assert session.stats().fine_bytes == 0


def test_a_fork_goes_its_own_way() -> None:
    _, session = opened(PLANS["interleaved"], eager=True)
    session.feed(IDS[:20])
    twin = session.fork()
    twin.feed(IDS[20:])
    session.feed(QUESTION * 8)
    for branch, ids in ((twin, IDS), (session, IDS[:20] + QUESTION * 8)):
        alone = RetrievalSession(session.loaded, PLANS["interleaved"], BM25, eager=True)
        alone.feed(ids)
        torch.testing.assert_close(
            everything(branch.with_fine(ALL)), everything(alone.with_fine(ALL)), **EXACT
        )


@pytest.mark.parametrize("eager", [False, True])
def test_a_past_that_was_replaced_leaves_nothing_at_the_fine_level(eager: bool) -> None:
    _, session = opened(PLANS["interleaved"], eager=eager)
    session.feed(IDS)
    session.with_fine(ALL)
    other = [*IDS[:20], *reversed(IDS[20:])]
    alone = RetrievalSession(session.loaded, PLANS["interleaved"], BM25, eager=eager)
    alone.feed(other)
    early = alone.fork()
    early.reset()
    early.feed(IDS[:16])
    # As a session that went back to its second window's end and read on.
    session._memory, session._rows, session._ids = early._memory.copy(), list(early._rows), [IDS[:16]]
    assert session.stats().fine_windows == 2
    session.feed(other[16:])
    assert same_bits(session.with_fine(ALL), alone.with_fine(ALL))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("eager", [False, True])
def test_a_session_on_disk_goes_on_with_what_it_had_at_the_fine_level(
    name: str, eager: bool, tmp_path: Path
) -> None:
    _, session = opened(PLANS[name], fine_ratio=2, eager=eager, retrieval=replace(BM25, topk=1))
    session.feed(IDS[:22])
    session.with_fine([Span(2, 3)])
    session.save(tmp_path / "saved")
    again = RetrievalSession.load(tmp_path / "saved", session.loaded)
    assert again.stats() == session.stats()
    assert again.stats().fine_windows > 0
    for branch in (session, again):
        branch.feed(IDS[22:])
    assert same_bits(again, session)
    assert same_bits(again.with_fine(ALL), session.with_fine(ALL))
    assert again.retrieved(f"w{IDS[9]}") == session.retrieved(f"w{IDS[9]}") != []
    assert again.stats() == session.stats()


def test_a_damaged_fine_level_is_refused(tmp_path: Path) -> None:
    _, session = opened(PLANS["interleaved"], eager=True)
    session.feed(IDS)
    session.save(tmp_path / "saved")
    with (tmp_path / "saved" / "fine.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x00")
    with pytest.raises(IntegrityError, match=r"fine\.safetensors"):
        RetrievalSession.load(tmp_path / "saved", session.loaded)


def test_what_was_read_after_the_last_closed_window_is_not_searched() -> None:
    _, session = opened(PLANS["interleaved"])
    session.feed([i for i in IDS if i != 60][:40])
    session.feed([60])
    assert session.retrieved("w60") == []


def test_a_question_brings_the_tokens_that_it_names_and_its_answer_differs() -> None:
    _, session = opened(PLANS["interleaved"])
    ids = [i for i in IDS if i not in (60, 61)]
    ids[20:22] = [60, 61]
    session.feed(ids)
    assert session.retrieved("what about w60 and w61?") == [Span(20, 24)]
    answering = session.answering("what about w60 and w61?")
    assert same_bits(answering, session.with_fine([Span(20, 24)]))
    assert (answering.feed(QUESTION) - session.fork().feed(QUESTION)).abs().max() > 1e-6


def test_topk_and_key_length_set_how_much_of_the_past_is_held_finely() -> None:
    rows = {}
    for topk, key_length in ((1, 4), (2, 4), (1, 8)):
        settings = RetrievalSettings("bm25", topk, key_length)
        _, session = opened(PLANS["interleaved"], retrieval=settings)
        session.feed([*range(3, 43), 50, 51])
        answering = session.answering("w5 w20")
        rows[topk, key_length] = answering.cursors[0].memory - session.cursors[0].memory
    # Four raw tokens stand where one beacon stood: three rows more for each key of four tokens.
    assert rows == {(1, 4): 3, (2, 4): 6, (1, 8): 6}


def test_a_past_that_is_raw_as_a_whole_needs_no_retrieval() -> None:
    _, session = opened(PLANS["interleaved"])
    session.feed(IDS[:7])
    assert session.retrieved("w9") == []
    assert same_bits(session.answering("w9"), session)


@pytest.mark.parametrize("query", [None, "", " "])
def test_no_query_is_one_line_and_exit_2(query: str | None) -> None:
    _, session = opened(PLANS["interleaved"])
    session.feed(IDS)
    with pytest.raises(SettingsError, match="no query") as caught:
        session.answering(query)
    assert caught.value.exit_code == 2


def test_no_past_is_one_line_and_exit_2() -> None:
    _, session = opened(PLANS["interleaved"])
    with pytest.raises(SettingsError, match="no index") as caught:
        session.answering("w9")
    assert caught.value.exit_code == 2


def test_a_batch_is_refused_before_it_is_read() -> None:
    _, session = opened(PLANS["interleaved"])
    with pytest.raises(SettingsError, match="not of a batch"):
        session.feed([IDS, IDS])
    session.feed(IDS)


@pytest.mark.parametrize(
    ("ratios", "fine_ratio", "words"),
    [((4,), 3, "does not divide"), ((2,), 4, "coarser"), ((0, 4), 2, "coarser"), ((4,), -1, "divide")],
)
def test_levels_that_cannot_be_are_refused(ratios: tuple[int, ...], fine_ratio: int, words: str) -> None:
    settings = BeaconSettings(window=8, ratios=ratios, ratio_mix="sequence")
    with pytest.raises(SettingsError, match=words):
        opened(settings, fine_ratio=fine_ratio)


@pytest.mark.parametrize(
    ("ratios", "levels"), [((8,), (8, 0)), ((8, 2), (8, 2)), ((0, 4), (4, 0)), ((2, 2), (2, 0))]
)
def test_one_ratio_means_raw_spans_and_of_two_the_finer_is_for_spans(
    ratios: tuple[int, ...], levels: tuple[int, int]
) -> None:
    assert split_levels(ratios) == levels


@pytest.mark.parametrize("ratios", [(0,), (2, 4, 8), (0, 2, 4)])
def test_ratios_that_are_no_two_levels_are_refused(ratios: tuple[int, ...]) -> None:
    with pytest.raises(SettingsError, match="with retrieval"):
        split_levels(ratios)


def test_the_method_decides_which_session_is_opened() -> None:
    settings = BeaconSettings(window=8, ratios=(4, 2), ratio_mix="sequence")
    _, session = opened(settings.with_ratios(4))
    plain = open_session(session.loaded, settings, RetrievalSettings())
    searching = open_session(session.loaded, settings, BM25)
    assert type(plain) is BeaconSession
    assert isinstance(searching, RetrievalSession)
    assert (searching.settings.ratios, searching.fine_ratio) == ((4,), 2)
    for session_of_both in (plain, searching):
        session_of_both.feed(IDS)
    assert plain.stats().ratios == ((4, 2, 4, 2, 4),)
    assert searching.stats().ratios == ((4, 4, 4, 4, 4),)


def test_an_interrupted_fine_level_leaves_the_session_before_the_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, session = opened(PLANS["overlapping"])
    session.feed(IDS[:20])
    before = session.fork()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("longlora_cli.beacon.fine_level.run_pass", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.feed(IDS[20:])
    assert session.ids == IDS[:20]
    assert same_bits(session, before)
    for branch in (session, before):
        branch.feed(IDS[20:])
    assert same_bits(session.with_fine(ALL), before.with_fine(ALL))


def test_settings_of_retrieval_are_checked_when_a_session_is_opened(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="neither none nor bm25"):
        opened(PLANS["interleaved"], retrieval=RetrievalSettings(str(tmp_path / "absent")))
    with pytest.raises(SettingsError, match="--retrieval-method is none"):
        opened(PLANS["interleaved"], retrieval=RetrievalSettings())
