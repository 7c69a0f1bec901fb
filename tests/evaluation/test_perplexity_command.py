"""`longlora eval --tasks ppl` from its settings to its numbers, on a real tiny model."""

from __future__ import annotations

import json
import math
import signal
import time

import numpy as np
import pytest
import torch

from longlora_cli.commands import eval as command
from longlora_cli.config import EvalConfig
from longlora_cli.console import Console
from longlora_cli.errors import Interrupted, SettingsError
from longlora_cli.evaluation import measure_perplexity, perplexity
from longlora_cli.evaluation.perplexity_plan import reading_of, work_tokens
from longlora_cli.evaluation.texts import read_texts
from longlora_cli.models.loading import load_model
from longlora_cli.models.tokenizer import load_tokenizer
from longlora_cli.options import resolve
from longlora_cli.sections import ModelSection

TEXTS = [
    "The river ran past the mill and the miller slept. " * 30,
    "The age of wisdom, the worst of times. " * 9,
]


@pytest.fixture
def texts(tmp_path):
    paths = [tmp_path / "0.txt", tmp_path / "1.txt"]
    for path, text in zip(paths, TEXTS, strict=True):
        path.write_text(text)
    return paths


def config_of(folder, out, paths, **settings):
    return EvalConfig(
        beyond=True,
        model=str(folder),
        dtype="fp32",
        device="cpu",
        tasks=["ppl"],
        out=out,
        data=paths,
        **settings,
    )


def run(config, *, dry_run=False):
    return command.run(config, Console(json_mode=True), dry_run=dry_run)


def ppl(*args, **settings):
    return run(config_of(*args, **settings))["tasks"]["ppl"]


@torch.no_grad()
def naive_nll(loaded, ids, bos, reading):
    """Sum and number of the losses of a text, a forward a token."""
    before = [] if bos is None else [bos]
    total, number = 0.0, 0
    for w in reading.windows(len(ids)):
        for token in range(w.first, w.stop):
            logits = loaded.causal_lm(torch.tensor([before + ids[w.start : token]])).logits[0, -1]
            total -= float(logits.double().log_softmax(-1)[ids[token]])
            number += 1
    return total, number


@pytest.mark.parametrize("bos", ["auto", "each", "first", "none"])
@pytest.mark.parametrize("docs", ["separate", "concat"])
def test_bos_and_documents_are_read_as_asked_and_all_tokens_once(
    bos_model_folder, texts, tmp_path, bos, docs
):
    loaded = load_model(
        ModelSection(model=str(bos_model_folder), dtype="fp32", device="cpu"), context_length=128
    )
    settings = {"window": 32, "stride": 16, "bos": bos, "docs": docs}
    found = ppl(bos_model_folder, tmp_path / "out", texts, **settings)
    contents = TEXTS if docs == "separate" else ["\n\n".join(TEXTS)]
    config = config_of(bos_model_folder, tmp_path / "none", texts, **settings)
    reading = reading_of(config, read_texts(texts, loaded.tokenizer, split="test", bos=bos, docs=docs))
    total, number = 0.0, 0
    for text in contents:
        ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = [0, *ids] if bos in ("auto", "first") else ids
        nats, tokens = naive_nll(loaded, ids, 0 if bos == "each" else None, reading)
        total, number = total + nats, number + tokens
        assert tokens == len(ids) - (bos != "each")
    assert found["n"] == number
    assert found["nll"] == pytest.approx(total / number, rel=1e-6)
    done = "first" if bos == "auto" else bos  # this tokenizer puts one itself
    assert (found["texts"], found["bos"], found["docs"]) == (len(contents), done, docs)
    if bos != "none":
        assert found["bytes"] == sum(len(text.encode()) for text in contents)


def test_the_first_tokens_bytes_do_not_count_when_nothing_predicts_it(tiny_model_folder, texts):
    tokenizer = load_tokenizer(tiny_model_folder)
    for text, content in zip(read_texts(texts, tokenizer, split="test"), TEXTS, strict=True):
        first = tokenizer.decode([int(text.content[0])])
        assert text.scored.bytes == len(content.encode()) - len(first.encode())


def test_the_short_context_leads_to_a_gain_in_every_table(tiny_model_folder, texts, tmp_path):
    found = ppl(tiny_model_folder, tmp_path / "out", texts, window=256, stride=128, short_context=32)
    assert (found["short_context"], found["short_stride"]) == (32, 16)
    assert [(b["from"], b["to"]) for b in found["by_position"]] == [(0, 128), (128, 256)]
    for bucket in found["by_position"]:
        assert bucket["short_perplexity"] == pytest.approx(math.exp(bucket["short_nll"]))
        assert bucket["gain"] == pytest.approx(bucket["short_nll"] - bucket["nll"], abs=1e-6)
    n = sum(b["n"] for b in found["by_position"])
    weighted = sum(b["n"] * b["gain"] for b in found["by_position"]) / n
    assert found["gain"]["n"] == n
    assert found["gain"]["gain"] == pytest.approx(weighted, abs=1e-9)
    assert found["gain"]["beyond"]["n"] == n - 31 * found["curve_windows"]


@pytest.mark.parametrize("prefill_chunk", [16, 4096])
def test_no_forward_holds_more_logits_than_a_tile_nor_reads_more_than_a_chunk(
    tiny_model_folder, texts, tmp_path, monkeypatch, prefill_chunk
):
    read, rows = [], []
    real = perplexity.token_losses

    def watched(hidden, weight, labels, *, tile_tokens):
        read.append(len(hidden))
        rows.append(tile_tokens)
        return real(hidden, weight, labels, tile_tokens=tile_tokens)

    monkeypatch.setattr(perplexity, "token_losses", watched)
    monkeypatch.setattr(perplexity, "_TILE_LOGITS", 512 * 20)
    compat = ["longlora", "hf-docs", "lm-eval"]
    ppl(
        tiny_model_folder, tmp_path / "out", texts, window=64, stride=64, short_context=16, compat=compat,
        prefill_chunk=prefill_chunk,
    )  # fmt: skip
    assert max(read) <= prefill_chunk
    assert set(rows) == {20}


def without_times(value):
    if isinstance(value, dict):
        dropped = {"seconds", "tokens_per_second", "peak_bytes", "out", "settings"}
        return {k: without_times(v) for k, v in value.items() if k not in dropped}
    return [without_times(v) for v in value] if isinstance(value, list) else value


MODES = [
    {"bos": "each", "docs": "concat"},
    {"short_context": 16},
    {"compat": ["longlora", "lm-eval"], "stride": 64},
    {"compat": ["hf-docs"], "stride": 64, "short_context": 48, "bos": "first"},
]


@pytest.mark.parametrize("settings", MODES, ids=lambda mode: " ".join(mode))
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_stopped_reading_goes_on_to_the_numbers_of_an_uninterrupted_one(
    bos_model_folder, texts, tmp_path, monkeypatch, settings, share
):
    monkeypatch.setattr(measure_perplexity, "_BLOCK_TOKENS", 64)
    real = perplexity.window_losses
    calls = []

    def counted(*args, **options):
        calls.append(None)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(perplexity, "window_losses", counted)

    def config(name):
        return config_of(bos_model_folder, tmp_path / name, texts, window=64, prefill_chunk=64, **settings)

    stop_at = -1
    whole = run(config("whole"))
    number, stop_at = len(calls), round(len(calls) * share)
    calls.clear()
    with pytest.raises(Interrupted):
        run(config("stopped"))
    journal = (tmp_path / ".stopped.partial" / "journal.jsonl").read_text().splitlines()
    assert journal
    stop_at = -1
    calls.clear()
    assert without_times(run(config("stopped"))) == without_times(whole)
    assert len(calls) < number  # what was finished is not read again
    for file in ("nll.npy", "nll_offsets.npy"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_killed_reading_goes_on_to_the_numbers_of_an_uninterrupted_one(
    tiny_model_folder, tmp_path, monkeypatch, server
):
    path = tmp_path / "long.txt"
    path.write_text(TEXTS[0] * 5)

    def config(name):
        return config_of(
            tiny_model_folder,
            tmp_path / name,
            [path],
            window=64,
            stride=8,
            short_context=16,
            compat=["lm-eval"],
        )

    (program := tmp_path / "program.py").write_text(
        "import sys; from longlora_cli.commands.eval import run; from longlora_cli.config import EvalConfig;"
        "from longlora_cli.console import Console; from longlora_cli.evaluation import measure_perplexity;"
        "measure_perplexity._BLOCK_TOKENS = 64;"
        "run(EvalConfig.model_validate_json(sys.argv[1]), Console(json_mode=True), dry_run=False)"
    )
    process = server.start(config("killed").model_dump_json(exclude_unset=True), script=program)
    journal = tmp_path / ".killed.partial" / "journal.jsonl"
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept = journal.read_bytes().count(b"\n")
    monkeypatch.setattr(measure_perplexity, "_BLOCK_TOKENS", 64)
    whole = run(config("whole"))
    assert 3 <= kept < whole["tasks"]["ppl"]["windows"]
    assert without_times(run(config("killed"))) == without_times(whole)
    assert (tmp_path / "killed/nll.npy").read_bytes() == (tmp_path / "whole/nll.npy").read_bytes()


def test_what_is_kept_of_one_way_of_reading_is_never_taken_for_another(bos_model_folder, texts, tmp_path):
    """All ways of reading share one journal and all results are those of their own journals."""
    from longlora_cli.evaluation.journal import Journal
    from longlora_cli.evaluation.measure_perplexity import measure_perplexity as measure
    from longlora_cli.evaluation.plan import make_plan

    loaded = load_model(
        ModelSection(model=str(bos_model_folder), dtype="fp32", device="cpu"), context_length=128
    )
    shared = Journal()
    for settings in (
        {}, {"bos": "each"}, {"bos": "none"}, {"stride": 64}, {"short_context": 16}, {"short_context": 24},
        {"docs": "concat"}, {"compat": ["longlora"]}, {"compat": ["lm-eval"]}, {"max_tokens": 100},
    ):  # fmt: skip
        config = config_of(bos_model_folder, tmp_path / "out", texts, window=64, **settings)
        plan = make_plan(config, loaded.tokenizer)
        together = measure(loaded, plan, shared, "model").summary
        assert without_times(together) == without_times(measure(loaded, plan, Journal(), "model").summary)


@pytest.mark.parametrize("settings", [*MODES, {"max_tokens": 40, "short_context": 16}], ids=str)
def test_progress_counts_what_is_done(bos_model_folder, texts, tmp_path, settings):
    from longlora_cli.evaluation.journal import Journal
    from longlora_cli.evaluation.measure_perplexity import measure_perplexity as measure
    from longlora_cli.evaluation.plan import make_plan

    loaded = load_model(
        ModelSection(model=str(bos_model_folder), dtype="fp32", device="cpu"), context_length=128
    )
    config = config_of(bos_model_folder, tmp_path / "out", texts, window=64, **settings)
    plan = make_plan(config, loaded.tokenizer)
    journal = Journal()
    for _ in range(2):  # the second time all is kept
        done = []
        measure(loaded, plan, journal, "model", done.append)
        assert sum(done) == work_tokens(config, plan.texts)


def test_a_files_numbers_are_those_of_its_saved_losses(bos_model_folder, texts, tmp_path):
    found = ppl(bos_model_folder, tmp_path / "out", texts, window=64, bos="each")
    nll = np.load(tmp_path / "out" / "nll.npy")
    assert len(nll) == found["n"]
    assert found["perplexity"] == pytest.approx(math.exp(nll.mean(dtype=np.float64)))
    samples = [json.loads(line) for line in (tmp_path / "out/samples/ppl.jsonl").read_text().splitlines()]
    assert [row["n"] for row in samples] == np.diff(np.load(tmp_path / "out" / "nll_offsets.npy")).tolist()
    assert found["words"] == sum(row["words"] for row in samples)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bos": "each"}, "--bos each: the tokenizer has no BOS token"),
        ({"bos": "first"}, "--bos first: the tokenizer has no BOS token"),
        ({"docs": "concat", "data": 1}, "--docs concat has no effect here: there is one text"),
        (
            {"short_context": 1000, "window": 2000},
            "--short-context 1000 has no effect here: the longest text",
        ),
        ({"compat": ["longlora"], "window": 400}, "--compat longlora reads nothing of these texts"),
    ],
)
def test_what_the_texts_leave_without_effect_is_refused_before_a_model_is_loaded(
    tiny_model_folder, texts, tmp_path, monkeypatch, settings, message
):
    monkeypatch.setattr(command, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    paths = texts[: settings.pop("data", 2)]
    with pytest.raises(SettingsError, match=message) as caught:
        ppl(tiny_model_folder, tmp_path / "out", paths, **settings)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tasks": ["passkey"], "bos": "each"}, "--bos has no effect"),
        ({"tasks": ["passkey"], "docs": "concat"}, "--docs has no effect"),
        ({"tasks": ["passkey"], "short_context": "2k"}, "--short-context has no effect"),
        ({"tasks": ["passkey"], "compat": ["lm-eval"]}, "--compat has no effect"),
        ({"tasks": ["ppl"], "short_context": "4k"}, "--short-context 4096 is not below --window 4096"),
        ({"tasks": ["ppl"], "compat": ["lmeval"]}, "--compat knows longlora, hf-docs, lm-eval; not lmeval"),
        ({"tasks": ["ppl"], "bos": "last"}, "bos"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(tmp_path, flags, message):
    with pytest.raises(SettingsError, match=message):
        resolve("eval", {"out": str(tmp_path / "o"), **flags})
