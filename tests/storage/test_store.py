"""Publishing is all or nothing; verification names every fault."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tiny import factorized_model, write_artifact

from lrserve.errors import ArtifactError
from lrserve.storage.store import (
    atomic_path,
    disk_errors_named,
    read_manifest,
    replace_files,
    replace_folder,
    staged,
    verify_files,
    write_json,
    write_manifest,
    write_tensors,
)
from lrserve.storage.work import differences, work_folder


def test_a_block_that_raises_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), staged(out, replace=True) as staging:
        (staging / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_publishing_replaces_and_verifies(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    for content in ("first", "second"):
        with staged(out, replace=True) as staging:
            (staging / "sub").mkdir()
            (staging / "sub" / "file").write_text(content)
            write_manifest(staging, {"lrserve": "0"}, {"seed": 0})
    assert (out / "sub" / "file").read_text() == "second"
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert verify_files(out) == []
    assert read_manifest(out)["inputs"] == {"seed": 0}
    (out / "sub" / "file").write_text("secant")
    assert verify_files(out) == ["sub/file differs from the manifest's sha256"]
    (out / "sub" / "file").write_text("longer than before")
    assert "bytes, the manifest says 6" in verify_files(out)[0]
    (out / "sub" / "file").unlink()
    assert verify_files(out) == ["sub/file is missing"]


def test_files_are_replaced_together_with_their_entries(tmp_path: Path) -> None:
    for name in ("card", "metrics", "weights"):
        (tmp_path / name).write_text(name)
    write_manifest(tmp_path, {"lrserve": "0"}, {"seed": 0})
    replace_files(tmp_path, {"card": "new", "metrics": "newer"})
    assert verify_files(tmp_path) == []
    assert read_manifest(tmp_path)["inputs"] == {"seed": 0}
    assert [(tmp_path / name).read_text() for name in ("card", "metrics", "weights")] == ["new", "newer", "weights"]
    (tmp_path / "metrics").write_text("changed")
    before = sorted((path.name, path.read_text()) for path in tmp_path.iterdir())
    for contents in ({"card": "newest", "metrics": "x"}, {"card": "newest", "unknown": "x"}):
        with pytest.raises(ArtifactError, match="is not the file that the manifest names"):
            replace_files(tmp_path, contents)
    assert sorted((path.name, path.read_text()) for path in tmp_path.iterdir()) == before


@pytest.fixture(params=[0o022, 0o077, 0o027])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): stat.S_IMODE(path.stat().st_mode) for path in [root, *root.rglob("*")]}


def test_every_published_file_follows_the_umask(tmp_path: Path, umask: int) -> None:
    source = tmp_path / "template.jinja"
    source.write_text("copied with its mode")
    source.chmod(0o400)
    with staged(tmp_path / "out", replace=False) as staging:
        write_artifact(factorized_model("LlamaForCausalLM"), staging / "vllm")  # safetensors are private files
        source.rename(staging / source.name)
        (staging / "onnx").mkdir(mode=0o700)
        (staging / "onnx" / "model.onnx_data").touch(mode=0o755)
        write_manifest(staging, {}, {})
    found = modes(tmp_path / "out")
    assert {"vllm/model.safetensors", "vllm/config.json", "template.jinja", "onnx/model.onnx_data", "manifest.json"} <= set(found)
    for name, mode in found.items():
        assert mode == (0o777 if (tmp_path / "out" / name).is_dir() else 0o666) & ~umask, name


def test_intermediate_and_cached_files_follow_the_umask(tmp_path: Path, umask: int) -> None:
    write_tensors(tmp_path / "factors.safetensors", {"A": torch.zeros(2, 2)})
    write_json(tmp_path / "plan.json", {})
    with atomic_path(tmp_path / "state.pt") as partial:
        partial.touch(mode=0o600)
    (tmp_path / "new").mkdir(mode=0o700)
    (tmp_path / "new" / "model.safetensors").touch(mode=0o600)
    replace_folder(tmp_path / "new", tmp_path / "dequantized")
    found = modes(tmp_path)
    assert found["dequantized"] == 0o777 & ~umask
    for name in ("factors.safetensors", "plan.json", "state.pt", "dequantized/model.safetensors"):
        assert found[name] == 0o666 & ~umask, name


def test_a_group_keeps_its_shared_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o2775)
    with staged(tmp_path / "out", replace=False) as staging:
        (staging / "file").touch()
    assert modes(tmp_path / "out")["."] & stat.S_ISGID


def test_a_disk_that_runs_full_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match="No space left on device; make room"),
        staged(tmp_path / "out", replace=True) as staging,
    ):
        (staging / "half").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(ArtifactError, match="make room"), disk_errors_named(tmp_path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert list(tmp_path.iterdir()) == []


def test_what_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ArtifactError, match="meanwhile"), staged(out, replace=False):
        out.mkdir()
        (out / "precious").write_text("x")
    assert (out / "precious").read_text() == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format_version": 99}'])
def test_a_missing_or_strange_manifest(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        read_manifest(tmp_path)
    with pytest.raises(ArtifactError, match="no folder"):
        read_manifest(tmp_path / "nowhere")


def test_the_work_folder_reuses_notices_and_locks(tmp_path: Path) -> None:
    said: list[str] = []
    with work_folder(tmp_path, said.append) as work:
        first = work.stage("calibration", {"seed": 0, "text": {"a": 1}})
        os.utime(first / "inputs.json", (1, 1))
        assert work.stage("calibration", {"text": {"a": 1}, "seed": 0}) == first
        assert said == []
        assert work.stage("calibration", {"seed": 1, "text": {"a": 2}}) != first
        assert said == ["calibration: made anew, since the last run here differs in seed (0 -> 1), text.a (1 -> 2)"]
        with pytest.raises(ArtifactError, match="another lrserve run"), work_folder(tmp_path, said.append):
            pass
    with work_folder(tmp_path, said.append):
        pass


def test_differences_names_added_and_removed_settings() -> None:
    assert differences({"a": 1}, {"b": 2}) == ["a (1 -> None)", "b (None -> 2)"]
    assert differences(json.loads('{"x": {"y": 1}}'), {"x": {"y": 1}}) == []
