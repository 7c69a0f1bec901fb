"""Two evaluations compared: known differences have known p, and only what was measured alike is compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longlora_cli.errors import IncompatibleError, IntegrityError, NotFoundError
from longlora_cli.evaluation.comparison import compare_evaluations, require_common_tasks
from longlora_cli.evaluation.finished import read_evaluation
from longlora_cli.evaluation.generation import hash_sample, score_rows
from longlora_cli.evaluation.grid import score_grid
from longlora_cli.evaluation.metrics import load_metrics
from longlora_cli.evaluation.paired import mcnemar, mcnemar_by_text, paired_bootstrap
from longlora_cli.storage import atomic_folder, write_json, write_text

SETTINGS: dict[str, Any] = {
    "model": "m",
    "tasks": ["needle"],
    "lengths": [1024, 4096],
    "depths": 5,
    "samples": 8,
    "seed": 0,
    "max_new_tokens": 64,
    "needle_facts": 8,
    "needle_wording": "train",
    "window": 64,
    "stride": None,
}
INPUTS: dict[str, Any] = {"tokenizer": "t", "chat_template": "c", "haystack": "h", "texts": []}


def grid_rows(wrong=(), *, lengths=(1024, 4096), depths=5, samples=8, text=""):
    """Rows of a needle grid; `wrong` holds the (length, depth number, sample) that were not found."""
    return [
        {
            "key": f"{length} {depth} {sample}",
            "task": "needle",
            "length": length,
            "depth": (depth + 0.5) / depths,
            "sample": sample,
            "sample_hash": hash_sample(f"{text} {length} {depth} {sample}", ["yes"]),
            "references": ["yes"],
            "prediction": "no" if (length, depth, sample) in wrong else "yes",
            "finish": "eos",
        }
        for length in lengths
        for sample in range(samples)
        for depth in range(depths)
    ]


def file_rows(predictions):
    return [
        {
            "task": "generate",
            "row": f"f:{n}",
            "sample_hash": hash_sample(n, ["a b c d"]),
            "references": ["a b c d"],
            "prediction": prediction,
            "finish": "eos",
        }
        for n, prediction in enumerate(predictions)
    ]


def make(folder: Path, *, needle=None, generate=None, nll=None, settings=None, inputs=None):
    """An evaluation folder as the command writes it, without a model."""
    tasks, samples = {}, {}
    if needle is not None:
        tasks["needle"], samples["needle"] = score_grid(needle)
    if generate is not None:
        tasks["generate"], samples["generate"] = score_rows(generate, load_metrics(["f1", "accuracy"]))
    hashes = dict(INPUTS)
    if nll is not None:
        tasks["ppl"] = {"n": sum(map(len, nll))}
        samples["ppl"] = [{"text": f"t{n}", "n": len(v), "bytes": 4 * len(v)} for n, v in enumerate(nll)]
        hashes["texts"] = [f"hash {n}" for n in range(len(nll))]
    results = {
        "settings": SETTINGS | (settings or {}),
        "model": {"name": folder.name},
        "inputs": hashes | (inputs or {}),
        "tasks": tasks,
    }
    with atomic_folder(folder, kind="evaluation") as staging:
        write_json(staging / "results.json", results)
        for task, rows in samples.items():
            write_text(staging / "samples" / f"{task}.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
        if nll is not None:
            np.save(staging / "nll.npy", np.concatenate(nll).astype(np.float32))
            np.save(staging / "nll_offsets.npy", np.cumsum([0, *map(len, nll)]))
    return read_evaluation(folder)


def cell_of(found, task, score, length=None):
    (cell,) = [c for c in found["cells"] if (c["task"], c["score"], c["length"]) == (task, score, length)]
    return cell


def losses(texts=2, tokens=200, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.gamma(2, 1, tokens).astype(np.float32) for _ in range(texts)]


def test_two_copies_of_a_run_differ_by_nothing_with_p_1(tmp_path):
    some_wrong = {(4096, depth, 3) for depth in range(4)} | {(1024, 0, 1)}
    parts = {"needle": grid_rows(some_wrong), "generate": file_rows(["a b", "x", "a b c d"]), "nll": losses()}
    found = compare_evaluations(make(tmp_path / "a", **parts), make(tmp_path / "b", **parts))
    assert {(c["task"], c["score"]) for c in found["cells"]} == {
        ("needle", "score"), ("needle", "contains"), ("generate", "f1"), ("generate", "accuracy"), ("ppl", "nll"),
    }  # fmt: skip
    for cell in found["cells"]:
        assert (cell["difference"], cell["p"], cell["p_holm"]) == (0.0, 1.0, 1.0)
        assert cell["ci95"] == [0.0, 0.0]
        assert cell["a"] == cell["b"]
    assert cell_of(found, "needle", "score", 4096)["p_by_text"] == 1.0
    assert cell_of(found, "ppl", "nll")["ratio"] == 1.0
    assert [facts["pairs"] for facts in found["tasks"].values()] == [3, 80, 2]  # by name
    assert all(facts["only_a"] == facts["only_b"] == [] for facts in found["tasks"].values())
    assert found["left_out"] == []
    assert found["settings"] == {}


def test_a_planted_difference_has_its_known_p_by_question_and_by_text(tmp_path):
    # At 4,096 tokens A misses 9 answers that B has, and B one that A has: 8 in two texts, the others alone.
    missed_by_a = {(4096, depth, sample) for depth in range(4) for sample in (0, 1)} | {(4096, 0, 2)}
    missed_by_b = {(4096, 1, 3)}
    found = compare_evaluations(
        make(tmp_path / "a", needle=grid_rows(missed_by_a)),
        make(tmp_path / "b", needle=grid_rows(missed_by_b)),
    )
    cell = cell_of(found, "needle", "score", 4096)
    assert (cell["n"], cell["clusters"], cell["a_only"], cell["b_only"]) == (40, 8, 1, 9)
    assert (cell["a"], cell["b"]) == (31 / 40, 39 / 40)
    assert cell["difference"] == pytest.approx(-0.2)
    assert cell["p"] == pytest.approx(22 / 1024)  # two tails of 0 or 1 of 10 coins
    assert cell["p_by_text"] == mcnemar_by_text([-4, -4, -1, 1]) == 6 / 16
    assert cell["ci95"] == list(paired_bootstrap([-4, -4, -1, 1, 0, 0, 0, 0], [5] * 8)[0])
    equal = cell_of(found, "needle", "score", 1024)
    assert (equal["difference"], equal["p"]) == (0.0, 1.0)
    whole = cell_of(found, "needle", "score")
    assert (whole["n"], whole["clusters"], whole["p"]) == (80, 16, mcnemar(1, 9))
    # Two lengths and two scores are looked at: the smaller p are multiplied by 4 and 3.
    assert cell["p_holm"] == pytest.approx(4 * 22 / 1024)
    assert cell_of(found, "needle", "contains", 4096)["p_holm"] == cell["p_holm"]
    assert whole["p_holm"] == pytest.approx(2 * 22 / 1024)


def test_graded_scores_have_a_paired_bootstrap(tmp_path):
    said = ["a b c d", "a b", "x", "a b c"] * 5
    found = compare_evaluations(
        make(tmp_path / "a", generate=file_rows(said)),
        make(tmp_path / "b", generate=file_rows([f"{s} wrong" if i < 12 else s for i, s in enumerate(said)])),
    )
    cell = cell_of(found, "generate", "f1")
    assert cell["test"] == "paired bootstrap"
    assert (cell["n"], cell["clusters"]) == (20, 20)
    assert cell["difference"] > 0
    assert cell["ci95"][0] > 0
    # 9 rows lost by the added word ("x" had nothing to lose): 2 / 2^9 is what their signs could say.
    assert cell["p"] == pytest.approx(2 / 2**9, rel=0.5)
    assert cell_of(found, "generate", "accuracy")["test"] == "McNemar"


def test_rows_are_paired_by_their_text_wherever_they_stand(tmp_path):
    rows = grid_rows({(1024, 2, 5)})
    found = compare_evaluations(
        make(tmp_path / "a", needle=rows), make(tmp_path / "b", needle=list(reversed(rows)))
    )
    assert cell_of(found, "needle", "score")["p"] == 1.0
    assert cell_of(found, "needle", "score")["a_only"] == 0


def test_rows_without_a_partner_are_named_with_the_setting_that_differs(tmp_path):
    a = make(
        tmp_path / "a", needle=grid_rows(lengths=(1024, 4096, 8192)), settings={"lengths": [1024, 4096, 8192]}
    )
    b = make(tmp_path / "b", needle=grid_rows(samples=6), settings={"samples": 6})
    found = compare_evaluations(a, b)
    facts = found["tasks"]["needle"]
    assert (facts["pairs"], len(facts["only_a"]), facts["only_b"]) == (60, 60, [])
    assert {"length": 8192, "depth": 0.1, "sample": 0} in facts["only_a"]
    assert {"length": 1024, "depth": 0.1, "sample": 7} in facts["only_a"]
    assert facts["why"] == ["--lengths 1024,4096,8192 and 1024,4096", "--samples 8 and 6"]
    assert found["settings"]["samples"] == [8, 6]
    assert {c["length"] for c in found["cells"]} == {None, 1024, 4096}


def test_another_seed_or_haystack_shares_no_sample_and_is_refused(tmp_path):
    a = make(tmp_path / "a", needle=grid_rows())
    seed = make(tmp_path / "b", needle=grid_rows(text="other"), settings={"seed": 1})
    with pytest.raises(IncompatibleError, match="no sample in common: --seed 0 and 1") as caught:
        compare_evaluations(a, seed)
    assert caught.value.exit_code == 4
    haystack = make(
        tmp_path / "c", needle=grid_rows(text="other"), inputs={"haystack": "h2", "tokenizer": "t2"}
    )
    with pytest.raises(IncompatibleError, match="another haystack, another tokenizer"):
        compare_evaluations(a, haystack)
    same = make(tmp_path / "d", needle=grid_rows(text="other"))
    with pytest.raises(IncompatibleError, match="no sample in common: other texts"):
        compare_evaluations(a, same)


def test_samples_fitted_to_another_tokenizer_are_paired_by_place_and_that_is_said(tmp_path):
    a = make(tmp_path / "a", needle=grid_rows({(1024, 0, 0)}))
    b = make(tmp_path / "b", needle=grid_rows(text="fitted"), inputs={"tokenizer": "t2"})
    found = compare_evaluations(a, b)
    assert found["tasks"]["needle"]["other_text"] == found["tasks"]["needle"]["pairs"] == 80
    assert cell_of(found, "needle", "score")["b_only"] == 1


def test_another_scorer_version_is_left_out_by_name(tmp_path):
    both = {"needle": grid_rows(), "generate": file_rows(["a", "a b c d"])}
    a = make(tmp_path / "a", **both)
    b = make(tmp_path / "b", **both)
    b.results["tasks"]["needle"]["scorer"] = "retrieval@exact-2"
    b.results["tasks"]["generate"]["scores"]["f1"]["scorer"] = "f1@other"
    found = compare_evaluations(a, b)
    assert {(c["task"], c["score"]) for c in found["cells"]} == {("generate", "accuracy")}
    assert found["left_out"] == [
        {"task": "generate", "score": "f1", "why": "scored by f1@longbench-2e00731 and f1@other"},
        {"task": "needle", "why": "scored by retrieval@exact-1 and retrieval@exact-2"},
    ]
    alone = make(tmp_path / "c", needle=grid_rows())
    alone.results["tasks"]["needle"]["scorer"] = "retrieval@exact-2"
    with pytest.raises(IncompatibleError, match="retrieval@exact-2"):
        compare_evaluations(a, alone)


def test_perplexity_is_compared_window_by_window_and_its_ratio_has_an_interval(tmp_path):
    nll = losses(texts=3, tokens=500)
    rng = np.random.default_rng(9)
    better = [values - 0.1 + rng.normal(0, 0.01, 500).astype(np.float32) for values in nll]
    found = compare_evaluations(make(tmp_path / "a", nll=better), make(tmp_path / "b", nll=nll))
    cell = cell_of(found, "ppl", "nll")
    assert cell["difference"] == pytest.approx(-0.1, abs=0.002)
    assert cell["ratio"] == pytest.approx(np.exp(-0.1), abs=0.002)
    assert cell["ratio_ci95"][0] < cell["ratio"] < cell["ratio_ci95"][1] < 1
    assert (cell["n"], cell["p"]) == (1500, pytest.approx(0.00064, abs=5e-6))  # no draw of 10,000 reaches 0
    # Windows of 64 every 32 tokens, of 501 tokens a text: one of 63 losses and 14 of at most 32.
    assert cell["clusters"] == 3 * 15
    assert cell["perplexity_a"] == pytest.approx(
        np.exp(np.concatenate(better).mean(dtype=np.float64)), rel=1e-6
    )
    # Alone, the texts' spread would hide it: the unpaired interval of 1,500 losses is 0.07 wide on either side.
    assert cell["ci95"][1] - cell["ci95"][0] < 0.01
    assert [t["text"] for t in found["tasks"]["ppl"]["texts"]] == ["t0", "t1", "t2"]


def test_perplexity_of_other_windows_or_texts_is_not_compared(tmp_path):
    a = make(tmp_path / "a", nll=losses())
    other = make(tmp_path / "b", nll=losses(), settings={"window": 128})
    with pytest.raises(IncompatibleError, match="--window 64 and 128, --stride 32 and 64"):
        compare_evaluations(a, other)
    explicit = make(tmp_path / "c", nll=losses(), settings={"stride": 32})
    assert compare_evaluations(a, explicit)["cells"][0]["p"] == 1.0  # half a window is the default
    texts = make(tmp_path / "d", nll=losses(), inputs={"texts": ["hash 1", "another"]})
    facts = compare_evaluations(
        make(tmp_path / "e", nll=losses(), inputs={"texts": ["hash 1", "hash 2"]}), texts
    )["tasks"]["ppl"]
    assert (facts["pairs"], facts["only_a"], facts["only_b"]) == (1, [{"text": "t1"}], [{"text": "t1"}])


def test_perplexity_of_two_tokenizers_is_compared_by_bytes(tmp_path):
    nll = losses(texts=4, tokens=100)
    half = [values[::2] + values[1::2] for values in nll]  # the same nats in half the tokens
    a = make(tmp_path / "a", nll=nll)
    b = make(tmp_path / "b", nll=half, inputs={"tokenizer": "t2"})
    for row in b.rows["ppl"]:
        row["bytes"] = 400
    cell = cell_of(compare_evaluations(a, b), "ppl", "bits_per_byte")
    assert cell["difference"] == pytest.approx(0, abs=1e-6)
    assert cell["a"] == pytest.approx(sum(map(np.sum, nll)) / np.log(2) / 1600)
    assert (cell["n"], cell["clusters"], cell["test"]) == (1600, 4, "paired bootstrap of texts")


def test_folders_of_before_there_were_hashes_are_paired_by_place_and_references(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "sample_hash"} for row in grid_rows({(1024, 1, 1)})]
    found = compare_evaluations(make(tmp_path / "a", needle=rows), make(tmp_path / "b", needle=grid_rows()))
    assert found["tasks"]["needle"]["pairs"] == 80
    assert cell_of(found, "needle", "score")["b_only"] == 1


def test_rows_about_one_document_are_one_cluster(tmp_path):
    rows = [row | {"document": f"f:{n // 5}"} for n, row in enumerate(file_rows(["a b c d"] * 20))]
    wrong = [row | {"prediction": "x"} if n < 10 else row for n, row in enumerate(rows)]
    cell = cell_of(
        compare_evaluations(make(tmp_path / "a", generate=rows), make(tmp_path / "b", generate=wrong)),
        "generate",
        "accuracy",
    )
    assert (cell["clusters"], cell["p"], cell["p_by_text"]) == (4, mcnemar(10, 0), 2 / 4)


def test_a_comparison_without_hope_is_refused_before_anything_is_measured(tmp_path):
    other = make(tmp_path / "b", nll=losses(), needle=grid_rows())
    require_common_tasks(SETTINGS, ["passkey", "ppl"], other)
    with pytest.raises(IncompatibleError, match="passkey is not in") as caught:
        require_common_tasks(SETTINGS, ["passkey"], other)
    assert caught.value.hint is not None
    with pytest.raises(IncompatibleError, match=r"ppl: measured with --window 32 and 64"):
        require_common_tasks(SETTINGS | {"window": 32}, ["ppl"], other)


def test_what_is_no_finished_evaluation_is_refused(tmp_path):
    with pytest.raises(NotFoundError, match="there is no evaluation"):
        read_evaluation(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match=r"has no manifest\.json"):
        read_evaluation(tmp_path / "empty")
    with atomic_folder(tmp_path / "model", kind="model"):
        pass
    with pytest.raises(IntegrityError, match="is a model, not a evaluation"):
        read_evaluation(tmp_path / "model")
    make(tmp_path / "a", needle=grid_rows())
    path = tmp_path / "a" / "samples" / "needle.jsonl"
    path.write_text(path.read_text().replace("yes", "yea", 1))
    with pytest.raises(IntegrityError, match=r"needle\.jsonl differs"):
        read_evaluation(tmp_path / "a")
