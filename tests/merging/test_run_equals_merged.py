"""A run that is loaded to be used has the weights of its merged folder, bit for bit, and so the same answers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longlora_cli.errors import NumericError
from longlora_cli.generation.session import Session
from longlora_cli.models import adapter as adapters
from longlora_cli.models.loading import LoadedModel, load_model
from longlora_cli.sections import ModelSection

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
STORED = {"fp32": torch.float32, "bf16": torch.bfloat16}


def also(choice: str, *, tied: bool) -> dict[str, Any]:
    if choice == "none":
        return {}
    if choice == "norms":
        return {"modules_to_save": NORMS}
    whole = [*NORMS, "embed_tokens", *([] if tied else ["lm_head"])]
    return {"modules_to_save": whole, "ensure_weight_tying": tied}


def load(folder: Path, dtype: str, **more: Any) -> LoadedModel:
    return load_model(ModelSection(model=str(folder), device="cpu", dtype=dtype, **more))


def assert_same_bits(run: LoadedModel, merged: LoadedModel) -> None:
    mine, its = run.model.state_dict(), merged.model.state_dict()
    assert mine.keys() == its.keys()
    assert [name for name in its if not torch.equal(mine[name], its[name])] == []
    assert [p.dtype for p in run.model.parameters()] == [p.dtype for p in merged.model.parameters()]


def pairwise() -> Iterator[Any]:
    """Every kind, beside trained tensors, ties and format; all pairs of them always, the rest in the slow tier."""
    choices = (list(KINDS), ["none", "norms", "all"], [True, False], ["fp32", "bf16"])
    for case in itertools.product(*choices):
        kind, also_train, tied, stored = (
            values.index(value) for values, value in zip(choices, case, strict=True)
        )
        among = tied == (kind + also_train) % 2 and stored == (kind // 2 + also_train) % 2
        yield pytest.param(*case, marks=[] if among else pytest.mark.slow)


def test_the_cases_that_always_run_hold_all_pairs() -> None:
    kept = [case.values for case in pairwise() if not case.marks]
    for one, other in itertools.combinations(range(4), 2):
        everything = {(case.values[one], case.values[other]) for case in pairwise()}
        assert {(case[one], case[other]) for case in kept} == everything


@pytest.mark.parametrize(("kind", "also_train", "tied", "stored"), pairwise())
def test_a_loaded_run_has_the_weights_of_its_merged_folder(
    make_base: Callable[..., Path],
    make_adapter: Callable[..., Path],
    merge: Callable[..., tuple[Path, dict[str, Any]]],
    kind: str,
    also_train: str,
    tied: bool,
    stored: str,
) -> None:
    base = make_base(dtype=STORED[stored], tie_word_embeddings=tied)
    adapter = make_adapter(base, **KINDS[kind], **also(also_train, tied=tied))
    folder, _ = merge(adapter)
    for dtype in ("fp32", "bf16"):
        run, merged, plain = load(adapter, dtype), load(folder, dtype), load(base, dtype)
        assert not run.source_has_adapter
        assert_same_bits(run, merged)
        name = "model.layers.0.mlp.up_proj.weight"
        assert not torch.equal(run.model.get_parameter(name), plain.model.get_parameter(name))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
    ],
    ids=["embedding alone", "head alone", "factors of the embedding"],
)
def test_a_head_that_leaves_its_embedding_does_so_in_both(
    make_base: Callable[..., Path],
    make_adapter: Callable[..., Path],
    merge: Callable[..., tuple[Path, dict[str, Any]]],
    settings: dict[str, Any],
) -> None:
    adapter = make_adapter(make_base(), **settings)
    folder, recipe = merge(adapter)
    run = load(adapter, "fp32")
    assert not recipe["tied_embeddings"]
    assert run.head_weight().data_ptr() != run.model.get_input_embeddings().weight.data_ptr()
    assert_same_bits(run, load(folder, "fp32"))


def test_a_tied_head_is_still_the_embedding_after_folding(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path]
) -> None:
    run = load(make_adapter(make_base(), **also("all", tied=True)), "bf16")
    assert run.head_weight().data_ptr() == run.model.get_input_embeddings().weight.data_ptr()


def test_run_and_merged_folder_give_the_same_answers_in_bf16(
    make_base: Callable[..., Path],
    make_adapter: Callable[..., Path],
    merge: Callable[..., tuple[Path, dict[str, Any]]],
) -> None:
    adapter = make_adapter(make_base(dtype=torch.bfloat16), **also("norms", tied=True))
    folder, _ = merge(adapter)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 500, (24,), generator=generator).tolist() for _ in range(16)]

    def answers(loaded: LoadedModel) -> list[list[int]]:
        session = Session(loaded)
        return [session.answer(p, max_new_tokens=16, stop_ids=frozenset()).ids for p in prompts]

    run = load(adapter, "bf16")
    assert answers(run) == answers(load(folder, "bf16"))
    # Beside the weights, the same adapter says something else: what folding is for.
    beside = load(make_base(dtype=torch.bfloat16), "bf16")
    beside.model = adapters.load(beside.model, adapter, trainable=False).eval()
    assert answers(beside) != answers(run)


def test_an_adapter_trained_on_nf4_stays_beside_nf4_weights_and_goes_into_original_ones(
    make_base: Callable[..., Path],
    make_adapter: Callable[..., Path],
    merge: Callable[..., tuple[Path, dict[str, Any]]],
) -> None:
    adapter = make_adapter(make_base(), quantization="nf4")
    assert load(adapter, "fp32").source_has_adapter
    folder, _ = merge(adapter, base_weights="original")
    assert_same_bits(load(adapter, "fp32", quantization="none"), load(folder, "fp32"))


def test_training_on_keeps_the_adapter_beside_the_weights(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path]
) -> None:
    section = ModelSection(model=str(make_adapter(make_base())), device="cpu", dtype="fp32")
    assert load_model(section, training=True).source_has_adapter


def test_an_adapter_that_cannot_be_merged_stays_beside_the_weights(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path]
) -> None:
    adapter = make_adapter(make_base(), init_lora_weights="olora")
    assert load(adapter, "fp32").source_has_adapter


def test_a_sum_too_large_for_a_float16_base_is_refused_as_merging_refuses_it(
    make_base: Callable[..., Path], make_adapter: Callable[..., Path]
) -> None:
    adapter = make_adapter(make_base(dtype=torch.float16), modules_to_save=["norm"])
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors["base_model.model.model.norm.weight"][0] = 70_000.0
    save_file(tensors, weights, metadata={"format": "pt"})
    (adapter / "longlora.json").unlink()  # without the record there is no manifest to differ from
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"]
    with pytest.raises(NumericError, match=r"model\.norm\.weight with its adapter"):
        load(adapter, "fp32")
