"""The algebra of mixing whole models."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from longlora_cli.errors import IncompatibleError, NumericError
from longlora_cli.merging.methods import METHODS
from longlora_cli.models.tensors import StoredRows, blocks, matrix_shape, open_folder, round_once

HALF = [torch.bfloat16, torch.float16]


def model_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_mixed_with_itself_is_itself(make_base, merge, dtype):
    base = make_base(dtype=dtype)
    merged, _ = merge(base, base, weights=[0.7, 0.3])
    for name, tensor in model_of(base).items():
        assert torch.equal(model_of(merged)[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_one_and_zero_give_the_first_model(make_base, merge, dtype):
    base, other = make_base(dtype=dtype), make_base(seed=1, dtype=dtype)
    merged, _ = merge(base, other, weights=[1, 0])
    for name, tensor in model_of(base).items():
        assert torch.equal(model_of(merged)[name], tensor), name


def test_the_order_of_equal_sources_does_not_matter(make_base, merge):
    one, other = make_base(dtype=torch.bfloat16), make_base(seed=1, dtype=torch.bfloat16)
    first, second = merge(one, other)[0], merge(other, one)[0]
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_the_order_of_the_tensors_in_a_file_does_not_matter(make_base, merge, tmp_path):
    one, other = make_base(), make_base(seed=1)
    shuffled = tmp_path / "shuffled"
    shutil.copytree(other, shuffled)
    tensors = model_of(other)
    names = sorted(tensors)
    half = {name: tensors[name] for name in names[::2]}, {name: tensors[name] for name in names[1::2]}
    (shuffled / "model.safetensors").unlink()
    placed = {}
    for number, part in enumerate(half):
        save_file(part, shuffled / f"part-{number}.safetensors")
        placed |= dict.fromkeys(part, f"part-{number}.safetensors")
    index = {"metadata": {}, "weight_map": placed}
    (shuffled / "model.safetensors.index.json").write_text(json.dumps(index))
    plain, other_order = merge(one, other, weights=[0.7, 0.3])[0], merge(one, shuffled, weights=[0.7, 0.3])[0]
    assert (plain / "model.safetensors").read_bytes() == (other_order / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_every_element_is_the_float64_sum_rounded_once(make_base, merge, dtype):
    bases = [make_base(seed=seed, dtype=dtype) for seed in range(3)]
    # Not decimal fractions: with those, sums of coarse numbers are often exactly between two neighbours.
    shares = [2**0.5 - 1, 3**0.5 - 1.5, 5**0.5 - 2]
    merged = model_of(merge(*bases, weights=shares)[0])
    wrong = total = 0
    for name, found in merged.items():
        exact = sum(share * model_of(base)[name].double() for share, base in zip(shares, bases, strict=True))
        # Correctly rounded: no neighbour is nearer than what was chosen.
        error = (found.double() - exact).abs()
        up = torch.nextafter(found, torch.full_like(found, torch.inf)).double()
        down = torch.nextafter(found, torch.full_like(found, -torch.inf)).double()
        wrong += int((error > torch.minimum((up - exact).abs(), (down - exact).abs())).sum())
        total += found.numel()
    assert total > 80_000
    assert wrong <= total / 10_000  # two float64 sums in another order may differ in the last place


@pytest.mark.parametrize("dtype", HALF)
def test_rounding_is_right_where_two_roundings_are_wrong(dtype):
    unit = torch.finfo(dtype).eps
    middle = 1 + unit / 2  # between two neighbours; a tie goes to 1, anything above to 1 + unit
    values = torch.tensor(
        [middle, middle + 1e-12, middle - 1e-12, -(middle + 1e-12), 3 * middle], dtype=torch.float64
    )
    expected = torch.tensor([1.0, 1 + unit, 1.0, -(1 + unit)], dtype=torch.float64)
    assert torch.equal(round_once(values, dtype)[:4].double(), expected)
    assert float(values[1].to(dtype)) == 1.0  # what two roundings make of it


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=64, allow_nan=False), min_size=1, max_size=40), st.sampled_from(HALF))
def test_rounding_is_nearest_for_any_number(values, dtype):
    exact = torch.tensor(values, dtype=torch.float64)
    found = round_once(exact, dtype)
    finite = found.isfinite()
    up = torch.nextafter(found, torch.full_like(found, torch.inf)).double()
    down = torch.nextafter(found, torch.full_like(found, -torch.inf)).double()
    error = (found.double() - exact).abs()
    nearest = (error <= (up - exact).abs()) & (error <= (down - exact).abs())
    assert bool(nearest[finite].all())
    half_step = torch.finfo(dtype).eps / 4  # of the largest number: above max + this, infinity is nearest
    assert bool((exact.abs()[~finite] >= torch.finfo(dtype).max * (1 + half_step / 2)).all())


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(), (1,), (99,), (1, 7), (7, 1), (3, 4, 5), (4097,)]),
    st.floats(-2, 2),
    st.integers(0, 2**31),
)
def test_linear_holds_for_shapes_of_any_rank(tmp_path_factory, shape, weight, seed):
    folder = tmp_path_factory.mktemp("shapes")
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator) for _ in range(2))
    save_file({"a": a, "b": b}, folder / "model.safetensors")
    files = open_folder(folder).tensors
    mixed = METHODS["linear"].prepare([StoredRows(files["a"]), StoredRows(files["b"])], [weight, 1 - weight])
    found = torch.cat([mixed.rows(*block) for block in blocks(matrix_shape(shape))])
    expected = weight * a.double() + (1 - weight) * b.double()
    torch.testing.assert_close(found.reshape(shape), expected, rtol=1e-14, atol=1e-15)


def test_a_source_with_weight_zero_cannot_spread_its_infinities(make_base, merge, tmp_path):
    base, broken = make_base(), tmp_path / "broken"
    shutil.copytree(make_base(seed=1), broken)
    tensors = model_of(broken)
    tensors["model.norm.weight"].fill_(torch.inf)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    from longlora_cli.merging.plan import plan_model, read_ingredients
    from longlora_cli.merging.quantized import ORIGINAL

    plan = plan_model(
        read_ingredients([str(base), str(broken)], None), [1, 0], METHODS["linear"], ORIGINAL, "auto"
    )
    norm = next(o for o in plan.outputs if o.name == "model.norm.weight")
    assert bool(norm.open().rows(0, 64).isfinite().all())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 1}, "only one of"),
        ({"intermediate_size": 128}, "layers.0.mlp.down_proj.weight is [64, 96] float32 in"),
        ({"dtype": torch.bfloat16}, "float32 in"),
    ],
    ids=["names", "shapes", "dtypes"],
)
def test_models_that_differ_in_names_shapes_or_dtypes_are_refused(make_base, merge, changes, named):
    with pytest.raises(IncompatibleError) as caught:
        merge(make_base(), make_base(seed=1, **changes))
    assert named in caught.value.message
    assert caught.value.exit_code == 4


def test_dtypes_may_differ_when_the_result_has_a_named_one(make_base, merge):
    merged, _ = merge(make_base(), make_base(seed=1, dtype=torch.bfloat16), dtype="fp32")
    assert {t.dtype for t in model_of(merged).values()} == {torch.float32}


def test_a_tied_and_an_untied_model_give_an_untied_one(make_base, merge, load_plain, logits):
    tied, untied = make_base(), make_base(seed=1, tie_word_embeddings=False)
    merged, result = merge(tied, untied)
    expected = 0.5 * (model_of(tied)["model.embed_tokens.weight"] + model_of(untied)["lm_head.weight"])
    assert result["tied_embeddings"] is False
    torch.testing.assert_close(load_plain(merged).lm_head.weight.data, expected)


def test_integer_tensors_must_be_equal(make_base, merge, tmp_path):
    folders = []
    for number in (0, 1):
        folder = tmp_path / f"with-integers-{number}"
        shutil.copytree(make_base(), folder)
        tensors = model_of(folder) | {"steps": torch.tensor([number])}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        folders.append(folder)
    with pytest.raises(IncompatibleError, match="integers of steps differ"):
        merge(*folders)
    merged, _ = merge(folders[1], folders[1])
    assert model_of(merged)["steps"].tolist() == [1]


def test_stale_rotary_frequencies_are_left_out(make_base, merge, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(make_base(), folder)
    tensors = model_of(folder) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    merged, _ = merge(folder, make_base())
    assert model_of(merged).keys() == model_of(make_base()).keys()


def test_values_that_float16_cannot_hold_are_refused(make_base, merge, tmp_path):
    folder = tmp_path / "large"
    shutil.copytree(make_base(), folder)
    tensors = model_of(folder)
    tensors["model.norm.weight"][0] = 70_000
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericError, match=r"model.norm.weight .* float16"):
        merge(folder, make_base(), weights=[1, 0], dtype="fp16", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
