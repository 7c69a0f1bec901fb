"""Documents never see each other, and a growing cache sees its past."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from longlora_cli.errors import IncompatibleError, SettingsError
from longlora_cli.memory import attention
from longlora_cli.memory.attention import make_attention, plain_attention
from longlora_cli.memory.attention_documents import PlainKernel
from longlora_cli.memory.attention_kernels import BACKENDS, attend
from longlora_cli.sections import ModelSection

HEADS, KV_HEADS, WIDTH = 4, 2, 8


def problem(tokens: int, past: int = 0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, length: int) -> Tensor:
        return torch.randn(
            1, heads, length, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True
        )

    return draw(HEADS, tokens), draw(KV_HEADS, past + tokens), draw(KV_HEADS, past + tokens)


def run(tensors: tuple[Tensor, Tensor, Tensor], **options: Any) -> Tensor:
    out, weights = make_attention("torch")(nn.Module(), *tensors, None, scaling=WIDTH**-0.5, **options)
    assert weights is None
    return out.transpose(1, 2)[0]


def expected(tensors: tuple[Tensor, Tensor, Tensor], **options: Any) -> Tensor:
    return plain_attention(*(t[0] for t in tensors), scaling=WIDTH**-0.5, **options)


def with_gradients(out: Tensor, tensors: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    slope = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, tensors, slope)]


@pytest.mark.parametrize("lengths", [[13], [1, 12], [5, 1, 7], [1] * 13])
def test_packed_documents_equal_plain_masked_attention_in_value_and_gradients(lengths: list[int]) -> None:
    tensors = problem(13)
    actual = with_gradients(run(tensors, document_lengths=[lengths]), tensors)
    wanted = with_gradients(expected(tensors, document_lengths=lengths), tensors)
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("tokens", "past"), [(1, 9), (4, 9), (9, 1), (5, 0)])
def test_new_tokens_see_the_cache_and_themselves(tokens: int, past: int) -> None:
    tensors = problem(tokens, past)
    torch.testing.assert_close(run(tensors), expected(tensors), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("tokens", "past"), [(12, 0), (3, 9), (1, 11)])
def test_a_sliding_window_hides_what_is_older(tokens: int, past: int) -> None:
    tensors = problem(tokens, past)
    torch.testing.assert_close(
        run(tensors, sliding_window=4), expected(tensors, window=4), rtol=1e-12, atol=1e-14
    )


def test_changing_one_document_changes_no_other() -> None:
    query, key, value = problem(10)
    before = run((query, key, value), document_lengths=[[4, 6]])
    with torch.no_grad():
        key[:, :, :4] += 1
        value[:, :, :4] += 1
    after = run((query, key, value), document_lengths=[[4, 6]])
    assert torch.equal(before[:, 4:], after[:, 4:])
    assert not torch.equal(before[:, :4], after[:, :4])


def test_lengths_that_do_not_fill_the_row_are_refused() -> None:
    with pytest.raises(IncompatibleError, match="documents of 9 tokens in a row of 10"):
        run(problem(10), document_lengths=[[4, 5]])


def test_rows_of_a_batch_have_their_own_documents() -> None:
    first, second = problem(6, seed=1), problem(6, seed=2)
    both = tuple(torch.cat(pair) for pair in zip(first, second, strict=True))
    out, _ = make_attention("torch")(
        nn.Module(), *both, None, scaling=WIDTH**-0.5, document_lengths=[[2, 4], [6]]
    )
    torch.testing.assert_close(
        out[0].transpose(0, 1), expected(first, document_lengths=[2, 4]), rtol=1e-12, atol=1e-14
    )
    torch.testing.assert_close(out[1].transpose(0, 1), expected(second), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", ["torch", "math", "auto", "flash"])
@pytest.mark.parametrize("options", [{}, {"kv_heads_per_call": 1}, {"shifted_group": 4}])
def test_the_registered_function_equals_the_seam(backend: str, options: dict[str, int]) -> None:
    tensors = problem(13)
    out, _ = make_attention(backend)(
        nn.Module(), *tensors, None, scaling=0.3, document_lengths=[[5, 8]], **options
    )
    packed = (t.transpose(1, 2)[0] for t in tensors)
    wanted = attend(*packed, [5, 8], 0.3, PlainKernel(), **options)
    torch.testing.assert_close(with_gradients(out[0], tensors), with_gradients(wanted, tensors))


def test_dropout_reaches_the_training_calls() -> None:
    tensors = problem(64)
    torch.manual_seed(0)
    first, second = run(tensors, dropout=0.5), run(tensors, dropout=0.5)
    assert not torch.equal(first, second)
    torch.testing.assert_close(run(tensors, dropout=0.0), expected(tensors), rtol=1e-12, atol=1e-14)


def test_a_window_works_on_packed_documents() -> None:
    query, key, value = problem(10)
    out = run((query, key, value), document_lengths=[[4, 6]], sliding_window=3)
    parts = [tuple(t[:, :, a:b] for t in (query, key, value)) for a, b in ((0, 4), (4, 10))]
    wanted = torch.cat([expected(part, window=3) for part in parts], 1)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("option", [{"sliding_window": 4}, {"dropout": 0.1}])
def test_shifted_groups_with_what_they_do_not_know_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(IncompatibleError, match="shifted attention works without"):
        run(problem(10), shifted_group=4, **option)


def test_the_default_scale_is_one_over_the_root_of_the_head_width() -> None:
    tensors = problem(5)
    out, _ = make_attention("torch")(nn.Module(), *tensors, None)
    torch.testing.assert_close(out.transpose(1, 2)[0], expected(tensors), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_registered_name_sounds_like_a_package_of_transformers(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "refuse_backend", lambda backend, device: None)
    name = attention.attention_name(backend, torch.device("cpu"))
    assert "flash" not in name
    from transformers import AttentionInterface

    assert name in AttentionInterface().valid_keys()


def test_a_gpu_backend_is_refused_on_a_cpu_before_a_model_is_loaded() -> None:
    with pytest.raises(SettingsError, match="--attention cudnn needs a GPU"):
        attention.attention_name("cudnn", torch.device("cpu"))


def test_every_backend_can_be_asked_for_on_the_command_line() -> None:
    assert get_args(ModelSection.model_fields["attention"].annotation) == BACKENDS


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cudnn", "auto"])
def test_on_a_gpu_the_kernel_is_no_further_from_fp32_than_torchs_plain_path(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = tuple(
        torch.randn(1, heads, 2500, 64, generator=generator).to("cuda", torch.bfloat16)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    lengths = [2100, 400]
    out, _ = make_attention(backend)(nn.Module(), *tensors, None, scaling=1 / 8, document_lengths=[lengths])
    exact = plain_attention(*(t[0].double().cpu() for t in tensors), scaling=1 / 8, document_lengths=lengths)
    error = (out[0].transpose(0, 1).double().cpu() - exact).abs().max()
    assert error < 2**-7  # one bf16 rounding of values near 2


@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("tokens", [1, 6])
def test_rows_with_a_gap_equal_the_rows_without_it(start: int, window: int | None, tokens: int) -> None:
    widths, past = [0, 2, 5], 9
    rows = [problem(tokens, past, seed) for seed in range(3)]
    query, key, value = (torch.cat(parts) for parts in zip(*rows, strict=True))
    gap = attention.Gap(start, torch.tensor(widths))
    call = make_attention("torch")
    out, _ = call(nn.Module(), query, key, value, scaling=WIDTH**-0.5, sliding_window=window, gap=gap)
    for row, width in enumerate(widths):
        real = [place for place in range(past + tokens) if not start <= place < start + width]
        asked = [place - past for place in real if place >= past]
        alone = rows[row][0][:, :, asked], rows[row][1][:, :, real], rows[row][2][:, :, real]
        wanted = expected(alone, window=window)
        torch.testing.assert_close(out[row, asked].transpose(0, 1), wanted, rtol=1e-12, atol=1e-14)


def test_what_a_gap_holds_reaches_nothing_and_leaves_no_hole_of_nan() -> None:
    query, key, value = (torch.cat([t, t]).detach() for t in problem(5, 0))
    gap = attention.Gap(0, torch.tensor([0, 3]))
    first, _ = make_attention("torch")(nn.Module(), query, key, value, gap=gap)
    key[1, :, :3], value[1, :, :3] = 1e6, -1e6
    second, _ = make_attention("torch")(nn.Module(), query, key, value, gap=gap)
    assert bool(first.isfinite().all())
    torch.testing.assert_close(first[1, 3:], second[1, 3:], rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"gap": attention.Gap(0, torch.tensor([1]))}, {"sliding_window": 2}])
def test_masked_attention_leaves_out_the_kernel_that_plans_every_shape(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    seen, true = [], torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return true(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    query, key, value = (tensor.detach() for tensor in problem(5, 0))
    make_attention("torch")(nn.Module(), query, key, value, **options)
    assert seen == [False]


def test_a_gap_beside_documents_is_refused() -> None:
    gap = attention.Gap(0, torch.tensor([0]))
    with pytest.raises(IncompatibleError, match="a gap works without documents"):
        run(problem(3), gap=gap, document_lengths=[[3]])
