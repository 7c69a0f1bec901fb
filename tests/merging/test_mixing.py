"""Mixtures of adapters are exact, as a whole model and as one adapter."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from longlora_cli.errors import IncompatibleError
from longlora_cli.models.source import resolve
from longlora_cli.storage import verify_folder

VARIANTS = {
    "plain": [{}, {}],
    "unequal ranks": [{"r": 2}, {"r": 8, "lora_alpha": 3}],
    "rslora and lora": [{"use_rslora": True, "r": 16}, {}],
    "patterns": [
        {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 1}},
        {"alpha_pattern": {"q_proj": 5}},
    ],
    "different targets": [{"target_modules": ["q_proj"]}, {"target_modules": ["v_proj", "down_proj"]}],
    "different layers": [{"layers_to_transform": [0]}, {"layers_to_transform": [1]}],
    "norms in one": [{"modules_to_save": ["norm", "input_layernorm"]}, {}],
    "embedding in one": [{"modules_to_save": ["embed_tokens"]}, {}],
    "head in the other": [{"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}],
    "tied embeddings": [{"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, {}],
    "tied in one": [
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["embed_tokens"]},
    ],
    "lora on embeddings": [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["embed_tokens"], "r": 3},
    ],
}


def weights_of(model) -> dict[str, torch.Tensor]:
    """A model's tensors in float64, adapters merged."""
    plain = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    return {name: tensor.double() for name, tensor in plain.state_dict().items()}


def mixture(base, sources, shares) -> dict[str, torch.Tensor]:
    total = {name: tensor * (1 - sum(shares)) for name, tensor in base.items()}
    for source, share in zip(sources, shares, strict=True):
        for name in total:
            total[name] += share * source[name]
    return total


@pytest.mark.filterwarnings("ignore")
# What a share beyond 0 to 1 does depends on no variant; with the others it is tried in the slow tier.
@pytest.mark.parametrize(
    ("variant", "shares"),
    [
        *((variant, [0.7, 0.3]) for variant in VARIANTS),
        *(
            pytest.param(
                variant,
                [1.5, -0.25],
                marks=[] if variant in ("unequal ranks", "tied in one") else pytest.mark.slow,
            )
            for variant in VARIANTS
        ),
    ],
)
def test_a_mixed_model_is_the_base_and_the_weighted_deltas(
    make_base, make_adapter, merge, load_plain, load_adapted, variant, shares
):
    base = make_base()
    pair = [make_adapter(base, seed=s, **settings) for s, settings in enumerate(VARIANTS[variant])]
    merged, _ = merge(*pair, weights=shares)
    expected = mixture(
        weights_of(load_plain(base)),
        [weights_of(load_adapted(a, untie="lora on" in variant)) for a in pair],
        shares,
    )
    found = weights_of(load_plain(merged))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-6, atol=2e-7, msg=name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_mixed_adapter_is_exact_and_peft_loads_it(
    make_base, make_adapter, merge, load_plain, load_adapted, variant
):
    base, shares = make_base(), [0.7, 0.3]
    pair = [make_adapter(base, seed=s, **settings) for s, settings in enumerate(VARIANTS[variant])]
    mixed, result = merge(*pair, weights=shares, keep_adapter=True)
    expected = mixture(
        weights_of(load_plain(base)),
        [weights_of(load_adapted(a, untie="lora on" in variant)) for a in pair],
        shares,
    )
    found = weights_of(load_adapted(mixed, untie="lora on" in variant))
    plain = weights_of(load_plain(base))

    assert verify_folder(mixed, "adapter")
    assert resolve(str(mixed)).base == str(base)
    for name, tensor in expected.items():
        delta, exact = found[name] - plain[name], tensor - plain[name]
        assert float((delta - exact).norm()) <= 1e-6 * float(exact.norm() + plain[name].norm()), name
    assert result["probe"]["max_difference"] <= 1e-4


def test_the_mixed_factors_alone_are_exact_to_one_in_a_million(make_base, make_adapter, merge):
    pair = [make_adapter(make_base(), use_rslora=True, r=16), make_adapter(make_base(), seed=1)]
    mixed, _ = merge(*pair, weights=[0.7, 0.3], keep_adapter=True)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"

    def product(folder) -> torch.Tensor:
        tensors = load_file(folder / "adapter_model.safetensors")
        return tensors[key.format("B")].double() @ tensors[key.format("A")].double()

    exact = 0.7 * (8 / 4) * product(pair[0]) + 0.3 * (8 / 4) * product(pair[1])  # scales 8/sqrt(16) and 8/4
    assert float((product(mixed) - exact).norm() / exact.norm()) <= 1e-6


@pytest.mark.parametrize(
    ("settings", "kind"), [({"use_dora": True}, "dora"), ({"init_lora_weights": "pissa"}, "pissa")]
)
def test_what_has_no_low_rank_mixture_is_mixed_whole_or_refused(
    make_base, make_adapter, merge, load_plain, load_adapted, settings, kind
):
    base = make_base()
    pair = [make_adapter(base, size=0.02, **settings), make_adapter(base, seed=1)]
    with pytest.raises(IncompatibleError, match=kind):
        merge(*pair, keep_adapter=True)
    merged, _ = merge(*pair, weights=[0.6, 0.4])
    expected = mixture(weights_of(load_plain(base)), [weights_of(load_adapted(a)) for a in pair], [0.6, 0.4])
    found = weights_of(load_plain(merged))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-6, atol=1e-6, msg=name)


def test_a_model_and_an_adapter_of_it_are_mixed_as_two_models(
    make_base, make_adapter, merge, load_plain, load_adapted
):
    base = make_base()
    adapter = make_adapter(base)
    merged, _ = merge(base, adapter, weights=[0.25, 0.75])
    plain = weights_of(load_plain(base))
    expected = mixture(plain, [plain, weights_of(load_adapted(adapter))], [0.25, 0.75])
    found = weights_of(load_plain(merged))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-6, atol=2e-7, msg=name)


def test_adapters_of_different_bases_are_not_mixed(make_base, make_adapter, merge):
    with pytest.raises(IncompatibleError, match="different bases"):
        merge(make_adapter(make_base()), make_adapter(make_base(seed=1)))


def test_the_sum_of_the_weights_is_told_when_it_is_not_one(make_base, make_adapter, merge):
    base = make_base()
    _, result = merge(make_adapter(base), make_adapter(base, seed=1), weights=[1, 1])
    assert result["notes"] == ["the weights sum to 2, not to 1"]
    _, result = merge(make_adapter(base), make_adapter(base, seed=1))
    assert (result["notes"], result["weights"]) == ([], [0.5, 0.5])


def test_adapters_without_a_record_are_not_mixed_across_bases(make_base, make_adapter, merge):
    pair = [make_adapter(make_base()), make_adapter(make_base(seed=1))]
    for adapter in pair:
        (adapter / "longlora.json").unlink()
        (adapter / "manifest.json").unlink()
    with pytest.raises(IncompatibleError, match="different bases"):
        merge(*pair)
