"""The kernel for CPUs, against the same product in float32."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

from lrserve.serving import linear, native


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Layer(nn.Module):
    cpu_linear: Any

    def __init__(self, m: int, n: int, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.randn(m, n) * n**-0.5).to(dtype), requires_grad=False)


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())


def test_packed_weight_has_pairs_of_inputs_of_48_rows_side_by_side() -> None:
    weight = torch.arange(50 * 4).view(50, 4)
    packed = linear.pack(weight)
    assert packed.shape == (64, 4)
    first, last = packed.flatten()[: 48 * 4].view(2, 48, 2), packed.flatten()[48 * 4 :].view(2, 16, 2)
    assert torch.equal(first[1, 7], weight[7, 2:])
    assert torch.equal(last[0, 1], weight[49, :2])
    assert not last[:, 2:].any()


@pytest.mark.skipif(not linear.supported(), reason="needs AVX-512, and no AMX")
@pytest.mark.parametrize("m", [1, 15, 16, 47, 48, 96, 100, 600])
@pytest.mark.parametrize("n", [2, 62, 576, 8194])
def test_product_is_that_of_float32_at_every_number_of_tokens_and_threads(m: int, n: int, threads: None) -> None:
    torch.manual_seed(m + n)
    assert linear.available()
    weight, bias = Layer(m, n).weight, torch.randn(m).to(torch.bfloat16)
    packed = linear.pack(weight)
    for tokens in (1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 600):
        x = torch.randn(tokens, n).to(torch.bfloat16)
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            for b in (None, bias):
                torch.testing.assert_close(linear.linear(x, packed, b, m).float(), exact(x, weight, b), rtol=8e-3, atol=1e-3)


@pytest.mark.skipif(not linear.supported(), reason="needs AVX-512, and no AMX")
def test_products_round_to_even_and_keep_what_is_no_number() -> None:
    assert linear.available()
    values = torch.tensor([1.0, 1 + 2**-7, float("inf"), -float("inf"), float("nan")]).to(torch.bfloat16)
    weight = torch.zeros(5, 2, dtype=torch.bfloat16)
    weight[:, 0], weight[:2, 1] = values, 2**-8  # the first two lie halfway between two values
    y = linear.linear(torch.ones(1, 2, dtype=torch.bfloat16), linear.pack(weight), None, 5)[0]
    torch.testing.assert_close(y, (weight.float().sum(1)).to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(
    not (linear.supported() and torch.cpu._is_avx512_bf16_supported()), reason="elsewhere the other tests are of this kernel"
)
def test_kernel_for_processors_without_products_of_bfloat16_is_right_as_well() -> None:
    script = """
import torch
torch.cpu._is_avx512_bf16_supported = lambda: False
from lrserve.serving import linear
assert linear.available()
for threads in (1, 2, 5):
    torch.set_num_threads(threads)
    for m, n, tokens in [(1, 2, 1), (100, 62, 9), (600, 576, 8), (48, 8194, 300)]:
        x, b = torch.randn(tokens, n).to(torch.bfloat16), torch.randn(m).to(torch.bfloat16)
        weight = (torch.randn(m, n) * n**-0.5).to(torch.bfloat16)
        exact = torch.nn.functional.linear(x.float(), weight.float(), b.float())
        torch.testing.assert_close(linear.linear(x, linear.pack(weight), b, m).float(), exact, rtol=8e-3, atol=1e-3)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.skipif(not linear.supported(), reason="needs AVX-512, and no AMX")
def test_inputs_may_be_strided_have_more_dimensions_or_no_tokens() -> None:
    layer = Layer(20, 64)
    packed = linear.pack(layer.weight)
    assert linear.available()
    x = torch.randn(2, 3, 128).to(torch.bfloat16)[..., ::2]
    y = linear.linear(x, packed, None, 20)
    assert y.shape == (2, 3, 20)
    torch.testing.assert_close(y.float(), exact(x, layer.weight, None), rtol=8e-3, atol=1e-3)
    assert linear.linear(x[:0], packed, None, 20).shape == (0, 3, 20)


@pytest.mark.skipif(not linear.supported(), reason="needs AVX-512, and no AMX")
def test_wrong_operands_are_refused() -> None:
    assert linear.available()
    packed, x = linear.pack(Layer(20, 64).weight), torch.randn(2, 64).to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="not packed for 40 x 64"):
        linear.linear(x, packed, None, 40)
    with pytest.raises(RuntimeError, match="multiplies bfloat16"):
        linear.linear(x.float(), packed, None, 20)
    with pytest.raises(RuntimeError, match="bias is not 20 values"):
        linear.linear(x, packed, x[0], 20)


@pytest.mark.skipif(not linear.supported(), reason="needs AVX-512, and no AMX")
@pytest.mark.parametrize("remove_weight", [True, False])
def test_layers_multiply_by_it_compiled_as_well(remove_weight: bool) -> None:
    layer = Layer(20, 64)
    weight = layer.weight.clone()
    linear.dispatch(None, layer, remove_weight)
    assert torch.equal(layer.weight, weight) == (not remove_weight)
    x = torch.randn(3, 64).to(torch.bfloat16)
    compiled = torch.compile(lambda x: layer.cpu_linear(x, layer.weight, None) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(x).float(), 2 * exact(x, weight, None), rtol=8e-3, atol=2e-3)


@pytest.mark.skipif(not linear.supported(), reason="needs AVX-512, and no AMX")
@pytest.mark.parametrize("biased", [True, False])
def test_graphs_in_cpp_call_the_kernel_directly(biased: bool) -> None:
    assert linear.available()
    weight, bias = Layer(20, 64).weight, torch.randn(20).to(torch.bfloat16) if biased else None
    packed, x = linear.pack(weight), torch.randn(3, 64).to(torch.bfloat16)
    compiled = torch.compile(lambda x: linear.linear(x, packed, bias, 20) * 2, fullgraph=True, options={"cpp_wrapper": True})
    y, code = run_and_get_code(compiled, x)
    assert "CHECK(aoti_torch_cpu_packed_linear(" in "".join(code)
    assert "lrserve::packed_linear" not in "".join(code)  # the dispatcher's name of it
    torch.testing.assert_close(y.float(), 2 * exact(x, weight, bias), rtol=8e-3, atol=2e-3)
    with pytest.raises(RuntimeError, match="aoti_torch_cpu_packed_linear.* failed"):
        torch.compile(lambda x: linear.linear(x, packed, bias, 20), options={"cpp_wrapper": True})(x[:, :62])


@pytest.mark.skipif(not linear.supported(), reason="needs AVX-512, and no AMX")
def test_processors_with_amx_are_left_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    assert linear.takes(Layer(8, 8).weight)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not linear.takes(Layer(8, 8).weight)


@pytest.mark.parametrize("layer", [Layer(8, 8, torch.float32), Layer(8, 7), Layer(8, 8).to("meta")])
def test_what_it_cannot_multiply_stays_vllms(layer: Layer) -> None:
    asked = []
    linear.dispatch(lambda *arguments: asked.append(arguments), layer, True)
    assert asked == [(layer, True)]


@pytest.mark.skipif(not linear.supported(), reason="needs AVX-512, and no AMX")
def test_without_a_compiler_products_stay_vllms(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LRSERVE_CACHE", str(tmp_path))
    monkeypatch.setattr(linear, "available", linear.available.__wrapped__)
    for compiler, reason in (("no-such-compiler", "No such file"), ("g++ -no-such-flag", "no-such-flag")):
        monkeypatch.setenv("CXX", compiler)
        assert not linear.takes(Layer(8, 8).weight)
        assert "vLLM's multiplies instead" in caplog.text
        assert reason in caplog.text
        caplog.clear()
    assert not list((tmp_path / "kernels").iterdir())


@pytest.mark.skipif(not linear.supported(), reason="needs AVX-512, and no AMX")
def test_kernel_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert linear.available()
    monkeypatch.setattr(subprocess, "run", None)
    assert native.library(linear._SOURCE, linear._flags()).is_file()
