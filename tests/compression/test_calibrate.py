"""The block-by-block pass on every family: same statistics as hooks on the whole model, resumable."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from blockwise import inputs_of
from tiny import FAMILIES_TESTED, VOCABULARY, dense_model

from lrserve.compression import calibrate as calibration
from lrserve.compression.calibrate import calibrate, read_statistics, statistics_path
from lrserve.compression.groups import find_groups


def windows(count: int = 6, length: int = 10) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", FAMILIES_TESTED)
def test_statistics_equal_those_of_the_whole_model(architecture: str, tmp_path: Path) -> None:
    model = dense_model(architecture)
    groups = find_groups(model)
    tokens = windows()
    calibrate(model, groups, tokens, tmp_path, pool_sequences=6, batch_tokens=20)
    for name, x in inputs_of(model, groups, tokens).items():
        found = read_statistics(tmp_path, next(g for g in groups if g.name == name))
        torch.testing.assert_close(found.C.double(), x.T.cov(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.mu.double(), x.mean(0), rtol=1e-3, atol=1e-4)
        assert found.tokens == tokens.numel()
    assert not list(tmp_path.glob("hidden*"))


def test_pools_that_do_not_fill_a_batch(tmp_path: Path) -> None:
    model = dense_model("LlamaForCausalLM")
    groups = find_groups(model)
    calibrate(model, groups, windows(7), tmp_path, pool_sequences=3, batch_tokens=20)
    found = read_statistics(tmp_path, groups[0])
    assert (found.tokens, found.pools) == (70, 3)
    assert found.pool_tokens.tolist() == [30, 30, 10]
    for name, x in inputs_of(model, groups, windows(7)).items():
        found = read_statistics(tmp_path, next(g for g in groups if g.name == name))
        torch.testing.assert_close(found.pool_means.double(), torch.stack([p.mean(0) for p in x.split(30)]), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.total().C, x.T.cov(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.second_moment(), x.T @ x / 70, rtol=1e-3, atol=1e-4)


def test_an_interrupted_pass_resumes_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense_model("LlamaForCausalLM", layers=4)
    groups = find_groups(model)
    tokens = windows()
    options = {"pool_sequences": 2, "batch_tokens": 20}
    calibrate(model, groups, tokens, tmp_path / "whole", **options)

    write = calibration.write_tensors

    def fail_at_third(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if path == statistics_path(tmp_path / "cut", 2):
            raise KeyboardInterrupt
        write(path, tensors)

    monkeypatch.setattr(calibration, "write_tensors", fail_at_third)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, groups, tokens, tmp_path / "cut", **options)
    monkeypatch.setattr(calibration, "write_tensors", write)
    steps: list[int] = []
    assert calibrate(model, groups, tokens, tmp_path / "cut", **options, progress=steps.append) == 2
    assert steps == [2, 3, 4]
    for group in groups:
        cut, whole = (read_statistics(tmp_path / name, group) for name in ("cut", "whole"))
        assert torch.equal(cut.C, whole.C)
        assert torch.equal(cut.pool_means, whole.pool_means)
    assert calibrate(model, groups, tokens, tmp_path / "cut", **options) == 4
