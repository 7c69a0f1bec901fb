"""The peers' rules against their known numbers, against their loops written out, and against lm-eval itself."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from longlora_cli.commands import eval as command
from longlora_cli.config import EvalConfig
from longlora_cli.console import Console
from longlora_cli.evaluation.peer_perplexity import (
    PeerWindow,
    hf_docs_windows,
    lm_eval_windows,
    longlora_windows,
    summarize_peer,
)
from longlora_cli.evaluation.texts import TextSize
from longlora_cli.models.loading import load_model
from longlora_cli.sections import ModelSection

VECTORS = json.loads((Path(__file__).parent / "perplexity_vectors.json").read_text(encoding="utf-8"))[
    "groups"
]
[WINDOWS] = [group for group in VECTORS if group["metric"] == "perplexity.windows"]
[ROLLING] = [group for group in VECTORS if group["metric"] == "perplexity.lm_eval_rolling_windows"]
TEXTS = [
    "The river ran past the mill and the miller slept. It was the best of times, it was the worst of times. "
    * 18,
    "The secret code of the amber falcon is 48213. What is the secret code? \n\n " * 25,
]


def toy(window):
    """Sum and count of the losses of a window by a model that pays 1 + 1/(c+1) nats after c tokens."""
    costs = [1 + 1 / (token - window.start + 1) for token in range(window.first, window.stop)]
    return [math.fsum(costs), len(costs)]


@pytest.mark.parametrize("case", WINDOWS["cases"], ids=lambda case: f"{case['N']}-{case['stride']}")
def test_hf_docs_weights_give_the_known_mean(case):
    windows = hf_docs_windows(case["N"], case["window"], case["stride"])
    found = summarize_peer("hf-docs", windows, np.array([toy(one.window) for one in windows]), [])
    assert abs(found["nll"] - case["mean_nll_hf_doc_2024_weights"]) < 1e-9
    assert sum(one.weight for one in windows) == case["hf_doc_token_count"]


@pytest.mark.parametrize("case", ROLLING["cases"], ids=lambda case: case["id"])
def test_lm_eval_windows_give_the_known_lengths_and_losses(case):
    windows = lm_eval_windows(case["tokens"], case["max_seq_len"], context=case["context_len"])
    assert [w.first - w.start for w in windows] == case["context_lengths"]
    assert [w.stop - w.first for w in windows] == case["target_lengths"]
    sums = [toy(w)[0] for w in windows]
    assert abs(math.fsum(sums) - case["toy_sum_nll"]) < 1e-9
    assert abs(math.fsum(sums) / case["tokens"] - case["toy_mean_nll"]) < 1e-9


def test_longlora_leaves_the_last_window_out_and_rounds_e():
    assert [w.start for w in longlora_windows(1000, 100)] == [0, 256, 512]
    assert [w.start for w in longlora_windows(357, 100)] == [0]
    assert longlora_windows(356, 100) == []
    windows = [PeerWindow(w, 1) for w in longlora_windows(1000, 100)]
    found = summarize_peer("longlora", windows, np.array([[99.0, 99], [198.0, 99], [297.0, 99]]), [])
    assert found["nll"] == 2.0
    assert found["perplexity"] == 2.71828**2 != math.exp(2)


def test_lm_eval_divides_by_words_and_bytes():
    found = summarize_peer(
        "lm-eval", [], np.array([[60.0, 20], [40.0, 10]]), [TextSize(50, 10), TextSize(150, 30)]
    )
    assert found["loglikelihood"] == -100
    assert found["word_perplexity"] == pytest.approx(math.exp(100 / 40))
    assert found["byte_perplexity"] == pytest.approx(math.exp(100 / 200))
    assert found["bits_per_byte"] == pytest.approx(100 / 200 / math.log(2))


# The peers' loops, written out with the library's own loss, on the command's own model and ids.


@torch.no_grad()
def longlora_loop(model, data, length):
    starts = list(range(0, len(data) - length, 256))
    starts.pop()
    losses = []
    for start in starts:
        x = torch.tensor([data[start : start + length]])
        losses.append(model(input_ids=x, labels=x).loss.item())
    return 2.71828 ** torch.tensor(losses).double().mean().item()


@torch.no_grad()
def hf_docs_loop(model, data, length, stride):
    total, tokens, reached = 0.0, 0, 0
    for begin in range(0, len(data), stride):
        end = min(begin + length, len(data))
        ids = torch.tensor([data[begin:end]])
        targets = ids.clone()
        targets[:, : -(end - reached)] = -100
        weight = int((targets != -100).sum()) - 1
        total += float(model(ids, labels=targets).loss) * weight
        tokens += weight
        reached = end
        if end == len(data):
            break
    return math.exp(total / tokens)


@pytest.fixture(scope="module", params=["no BOS", "BOS"])
def model_folder(request, tiny_model_folder, bos_model_folder):
    """The tiny model with its tokenizer, and with one that puts a BOS in front of a text."""
    return {"no BOS": tiny_model_folder, "BOS": bos_model_folder}[request.param]


@pytest.fixture(scope="module")
def loaded(model_folder):
    return load_model(ModelSection(model=str(model_folder), dtype="fp32", device="cpu"), context_length=128)


@pytest.fixture
def texts(tmp_path):
    paths = [tmp_path / "0.txt", tmp_path / "1.txt"]
    for path, text in zip(paths, TEXTS, strict=True):
        path.write_text(text)
    return paths


def measured(folder, out, paths, **settings):
    config = EvalConfig(
        beyond=True,
        model=str(folder),
        dtype="fp32",
        device="cpu",
        tasks=["ppl"],
        out=out,
        data=paths,
        **settings,
    )
    return command.run(config, Console(json_mode=True), dry_run=False)["tasks"]["ppl"]


@pytest.mark.parametrize("stride", [16, 32, 63, 64])
def test_the_commands_numbers_are_those_of_the_peers_loops(loaded, model_folder, texts, tmp_path, stride):
    paths, settings = texts[:1], {"window": 64, "stride": stride, "compat": ["longlora", "hf-docs"]}
    found = measured(model_folder, tmp_path / "out", paths, **settings)["compat"]
    data = loaded.tokenizer(TEXTS[0])["input_ids"]
    assert found["longlora"]["perplexity"] == pytest.approx(
        longlora_loop(loaded.causal_lm, data, 64), rel=1e-5
    )
    expected = hf_docs_loop(loaded.causal_lm, data, 64, stride)
    assert found["hf-docs"]["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_concatenated_texts_are_the_stream_of_the_transformers_docs(loaded, model_folder, texts, tmp_path):
    found = measured(
        model_folder,
        tmp_path / "out",
        texts,
        window=64,
        stride=32,
        docs="concat",
        compat=["hf-docs", "longlora"],
    )
    data = loaded.tokenizer("\n\n".join(TEXTS))["input_ids"]
    expected = hf_docs_loop(loaded.causal_lm, data, 64, 32)
    assert found["compat"]["hf-docs"]["perplexity"] == pytest.approx(expected, rel=1e-5)
    expected = longlora_loop(loaded.causal_lm, data, 64)
    assert found["compat"]["longlora"]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert (found["texts"], found["docs"]) == (1, "concat")


@pytest.mark.parametrize("window", [48, 64])
def test_lm_evals_own_rolling_loglikelihood_is_ours(loaded, model_folder, texts, tmp_path, window):
    pytest.importorskip("lm_eval", reason="in the extra dev")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    judge = HFLM(
        pretrained=loaded.causal_lm, tokenizer=loaded.tokenizer, max_length=window, batch_size=1, device="cpu"
    )
    requests = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(TEXTS)]
    expected = judge.loglikelihood_rolling(requests, disable_tqdm=True)
    words = sum(len(re.split(r"\s+", text)) for text in TEXTS)  # as its PerplexityTask.count_words
    sizes = sum(len(text.encode()) for text in TEXTS)

    found = measured(model_folder, tmp_path / "out", texts, window=window, compat=["lm-eval"])["compat"][
        "lm-eval"
    ]
    assert found["loglikelihood"] == pytest.approx(sum(expected), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(-sum(expected) / sizes / math.log(2), rel=1e-6)
    assert found["byte_perplexity"] == pytest.approx(math.exp(-sum(expected) / sizes), rel=1e-5)
    assert found["word_perplexity"] == pytest.approx(math.exp(-sum(expected) / words), rel=1e-5)


def test_our_rolling_windows_are_those_of_lm_eval():
    pytest.importorskip("lm_eval", reason="in the extra dev")
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for tokens in (1, 2, 31, 32, 33, 64, 100):
        ids = [-1, *range(tokens)]
        for size, context in ((4, 1), (4, 3), (32, 1), (32, 8), (33, 33)):
            pairs = get_rolling_token_windows(ids[1:], -1, size, context)
            expected = [make_disjoint_window(pair) for pair in pairs]
            found = [
                (ids[w.start : w.first], ids[w.first : w.stop])
                for w in lm_eval_windows(tokens, size, context=context)
            ]
            assert found == expected
