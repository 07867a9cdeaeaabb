"""Attention in float32 under bfloat16: the same function, closer to the exact one, and nothing else is touched."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from flowalign.align.attention import FloatAttention, forwards

CPU = torch.device("cpu")


def inputs(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 17, 20, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def attend(tensors: list[Tensor], mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    out = scaled_dot_product_attention(*tensors, attn_mask=mask)
    out.float().square().sum().backward()
    return out, [tensor.grad for tensor in tensors if tensor.grad is not None]


@pytest.mark.parametrize("mask", [None, torch.linspace(-2, 2, 17 * 17).view(17, 17).bfloat16()])
def test_values_and_gradients_are_those_of_float32_rounded_once(mask: Tensor | None) -> None:
    with FloatAttention():
        out, gradients = attend(inputs(torch.bfloat16), mask)
    # The same bfloat16 numbers, all in float32; only the output is rounded before it is squared.
    rounded = [tensor.detach().float().requires_grad_() for tensor in inputs(torch.bfloat16)]
    exact = scaled_dot_product_attention(*rounded, attn_mask=None if mask is None else mask.float())
    exact.bfloat16().float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact.bfloat16())
    for mine, tensor in zip(gradients, rounded, strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.float(), tensor.grad, rtol=0.01, atol=0.01)


def test_autocast_rounds_its_output_and_not_what_is_inside() -> None:
    tensors = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16), FloatAttention():
        out = scaled_dot_product_attention(*tensors)
        assert linear(tensors[0], torch.ones(4, 20)).dtype == torch.bfloat16  # autocast is on again
    assert torch.equal(out, scaled_dot_product_attention(*tensors).bfloat16())


def test_arguments_may_have_names() -> None:
    query, key, value = inputs(torch.bfloat16)
    with FloatAttention():
        named = scaled_dot_product_attention(query=query, key=key, value=value, scale=0.3)
        assert torch.equal(named, scaled_dot_product_attention(query, key, value, scale=0.3))


def test_float32_and_other_functions_are_left_alone() -> None:
    tensors = inputs(torch.float32)
    with FloatAttention():
        assert torch.equal(scaled_dot_product_attention(*tensors), scaled_dot_product_attention(*inputs(torch.float32)))
        assert (tensors[0].bfloat16() + 1).dtype == torch.bfloat16


def test_only_a_cpu_whose_kernels_may_be_exchanged_has_it() -> None:
    assert forwards(nullcontext, torch.device("cuda"), kernels=True) is nullcontext
    assert forwards(nullcontext, CPU, kernels=False) is nullcontext
    with torch.autocast("cpu", torch.bfloat16), forwards(nullcontext, CPU, kernels=True)():
        out = scaled_dot_product_attention(*inputs(torch.float32))
    assert torch.equal(out, scaled_dot_product_attention(*inputs(torch.float32)).bfloat16())
