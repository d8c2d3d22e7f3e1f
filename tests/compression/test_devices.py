"""The maths on a device that is not the CPU: everything is created there, the numbers are the CPU's, and the host seldom waits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretend import DEVICE, pretended, put
from tiny import VOCABULARY, dense_model

from lrserve.compression.calibrate import calibrate, read_statistics
from lrserve.compression.covariance import exact_products
from lrserve.compression.factorize import GradientOf, Side, Spectrum, factorize
from lrserve.compression.groups import Group, allocated, find_groups
from lrserve.compression.narrow import Neurons, narrow
from lrserve.compression.propagate import propagation
from lrserve.compression.rounding import Rounding
from lrserve.compression.sequential import walk
from lrserve.compression.spectra import SpectrumStore, features, write_spectra
from lrserve.compression.transfer import Receiver, sent

SIDES: list[Side | None] = [None, "output", "input"]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(m: int, n: int, side: Side | None) -> tuple[Any, ...]:
    """W, C, mu, beta and a gradient's moment."""
    x, g = random(4 * n, n), random(4 * m, m, seed=1)
    W, moment = random(m, n, seed=2), g.T @ g
    gradient = None if side is None else (side, moment if side == "output" else W.T @ moment @ W)
    return W, x.T @ x, x.mean(0), random(m, seed=3), gradient


def there(value: Any) -> Any:
    """Return a tensor, or the side and the tensor of a gradient, on the device."""
    if isinstance(value, tuple):
        return value[0], value[1].to(DEVICE)
    return None if value is None else value.to(DEVICE)


def same(found: Any, expected: Any) -> bool:
    """Whether all tensors of two results are equal."""
    pairs = ((getattr(found, field.name), getattr(expected, field.name)) for field in fields(expected))
    return all(torch.equal(a.cpu(), b) if isinstance(b, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("solve", [factorize, narrow])
def test_factors_are_found_on_the_device(solve: Callable[..., Spectrum | Neurons], side: Side | None) -> None:
    reads = []
    for n in (40, 160):
        given = problem(24, n, side)
        with pretended() as read:
            spectrum = solve(*map(there, given))
            assert all(getattr(spectrum, field.name).device == DEVICE for field in fields(spectrum))
            assert same(spectrum, solve(*given))
            assert same(spectrum.cut(8), solve(*given).cut(8))
            reads.append(len(read))
    assert reads[0] == reads[1] <= 10  # not one for each row


def model_and_windows() -> tuple[Any, list[Group], torch.Tensor]:
    model = dense_model("Qwen2ForCausalLM")
    return model, find_groups(model), torch.randint(VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))


def fisher(group: Group) -> tuple[Side, torch.Tensor]:
    g = random(64, group.n, seed=4)
    return "input", g.T @ g


@pytest.mark.parametrize("structure", ["narrow", "low_rank"])
def test_the_walks_through_a_model_on_the_device_give_what_they_give_on_the_cpu(tmp_path: Path, structure: Any) -> None:
    gradient: GradientOf = fisher
    results: list[dict[str, torch.Tensor]] = []
    for place in (tmp_path / "cpu", tmp_path / "device"):
        model, groups, windows = model_and_windows()
        units = allocated(groups, structure)
        with pretended():
            if place.name == "device":
                put(model)
            calibrate(model, groups, windows, place / "c", pool_sequences=3, batch_tokens=32)
            write_spectra(model, units, features(place / "c", gradient), place / "s")
            store = SpectrumStore(place / "s", units, place / "c", next(model.parameters()).device)
            walked = walk(model, [(unit, 8) for unit in units], windows, place / "w", propagation(gradient), batch_tokens=32)
            found = {unit.name + ".B": store.cut(unit.name, 8).B.cpu() for unit in units}
        found |= {group.name: read_statistics(place / "c", group).C for group in groups}
        results.append(found | walked.tensors())
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        assert type(results[1][name]) is torch.Tensor, name
        torch.testing.assert_close(results[1][name], expected, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_a_group_that_does_not_fit_on_the_device_is_factorized_on_the_cpu(tmp_path: Path) -> None:
    model, groups, windows = model_and_windows()
    calibrate(model, groups, windows, tmp_path / "c", pool_sequences=3, batch_tokens=32)
    decompose, tried = features(tmp_path / "c"), []

    def short(group: Group, weight: torch.Tensor, bias: torch.Tensor | None) -> Spectrum:
        tried.append(weight.device.type)
        if weight.device == DEVICE and group.kind == "qkv":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decompose(group, weight, bias)

    write_spectra(model, groups, decompose, tmp_path / "cpu")
    with pretended():
        put(model)
        write_spectra(model, groups, short, tmp_path / "device")
    assert tried == [DEVICE.type, "cpu", *[DEVICE.type] * 3] * 2
    stores = [SpectrumStore(tmp_path / name, groups) for name in ("cpu", "device")]
    assert all(same(*(store.spectrum(group.name) for store in stores)) for group in groups)


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("weights", ["int8", "int4_g32"])
def test_weights_are_rounded_on_the_device(weights: Any, diagonal: bool) -> None:
    group = Group(name="g", kind="down", layer=0, members=("g",), out_features=(24,), in_features=96)
    x, g, W = random(300, 96), random(100, 24, seed=1), random(24, 96, seed=2).float()
    moment = g.T @ g
    found = []
    for device in ("cpu", DEVICE):
        with pretended() as reads:
            rounding = Rounding(lambda _: x.T @ x, lambda _: moment.diagonal() if diagonal else moment, torch.bfloat16, device)
            rounded = rounding.weight(group, W, weights, scales=torch.ones(96))
            spectrum = rounding.residual(group, W, rounded, inputs=torch.arange(96), outputs=torch.arange(24))
            found.append((rounded, spectrum))
        assert len(reads) <= 12
    assert reads  # the second time numbers came from the device
    assert all(same(*pair) for pair in zip(*found, strict=True))


class OnCuda:
    """A result on a GPU, and what is asked of it."""

    def __init__(self, values: torch.Tensor, asked: list[Any]) -> None:
        self.values, self.asked, self.device = values, asked, torch.device("cuda")

    def to(self, device: str, *, non_blocking: bool) -> torch.Tensor:
        self.asked.append(("to", device, non_blocking))
        return self.values


class OnHost(OnCuda):
    """A batch that is not there yet."""

    def pin_memory(self) -> OnHost:
        self.asked.append("pinned")
        return self


def test_batches_reach_a_gpu_from_pinned_memory() -> None:
    asked: list[Any] = []
    batches: Any = (OnHost(torch.full((2,), float(i)), asked) for i in range(2))
    cuda = torch.device("cuda")
    assert [float(batch[0]) for batch in sent(batches, cuda)] == [0.0, 1.0]
    assert asked == ["pinned", ("to", cuda, True)] * 2
    [same_batch] = sent([batch := torch.ones(2)], torch.device("cpu"))
    assert same_batch is batch


def test_results_of_a_gpu_are_read_when_the_next_one_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    event = SimpleNamespace(record=lambda: asked.append("recorded"), synchronize=lambda: asked.append("waited"))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    targets, receiver = torch.zeros(2, 3), Receiver()
    for row, target in enumerate(targets, 1):
        result: Any = OnCuda(torch.full((3,), float(row)), asked)
        receiver.put(target, result)
    copied = [("to", "cpu", True), "recorded"]
    assert asked == [*copied, *copied, "waited"]
    assert targets.tolist() == [[1.0] * 3, [0.0] * 3]
    receiver.finish()
    receiver.finish()
    assert asked == [*copied, *copied, "waited", "waited"]
    assert targets.tolist() == [[1.0] * 3, [2.0] * 3]


@pytest.mark.parametrize(
    ("device", "dtype", "within"),
    [
        ("cuda", torch.bfloat16, "tf32"),
        ("cuda", torch.float16, "tf32"),
        ("cuda", torch.float32, None),
        ("cpu", torch.bfloat16, None),
    ],
)
def test_tensor_cores_multiply_what_they_hold_exactly(device: str, dtype: torch.dtype, within: str | None) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    x: Any = SimpleNamespace(device=torch.device(device), dtype=dtype)
    with exact_products(x):
        assert torch.backends.cuda.matmul.fp32_precision == (within or before)
    assert torch.backends.cuda.matmul.fp32_precision == before
