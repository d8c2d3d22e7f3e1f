from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lrserve.engines.memory import Memory, free_memory
from lrserve.errors import InputError
from lrserve.serving import kv_cache
from lrserve.serving.flags import read_flags
from lrserve.serving.kv_cache import model_cache, serving_cache

GIB = 2**30
LLAMA = {
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "max_position_embeddings": 131072,
}
TOKEN = 2 * 30 * 3 * 64 * 2


def write(folder: Path, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    (folder / "model.safetensors").write_bytes(b"1" * 1000)
    return folder


@pytest.mark.parametrize(
    ("changes", "arguments", "context", "token_bytes"),
    [
        ({}, [], 131072, TOKEN),
        ({}, ["--max-model-len", "32k"], 32000, TOKEN),
        ({}, ["--max-model-len=32K", "--dtype", "float32"], 32768, 2 * TOKEN),
        ({}, ["-tp", "3"], 131072, TOKEN // 3),
        ({"head_dim": 128}, [], 131072, 2 * TOKEN),
        ({"num_key_value_heads": None}, [], 131072, 3 * TOKEN),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, [], 262144, TOKEN),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, [], 131072, TOKEN),
        ({"rope_scaling": {"rope_type": "longrope"}, "original_max_position_embeddings": 4096}, [], 4096, TOKEN),
        ({"text_config": {"num_hidden_layers": 15}}, [], 131072, TOKEN // 2),
    ],
)
def test_the_cache_is_that_of_the_model(
    tmp_path: Path, changes: dict[str, Any], arguments: list[str], context: int, token_bytes: int
) -> None:
    found = model_cache(write(tmp_path, **changes), read_flags(arguments))
    assert found is not None
    assert (found.context, found.token_bytes) == (context, token_bytes)
    assert found.needed == (-(-context // 128) + 1) * 128 * token_bytes
    assert found.longest(found.needed) == -(-context // 128) * 128


@pytest.mark.parametrize("wrong", [{"num_hidden_layers": None}, {"hidden_size": "576"}, {"max_position_embeddings": -1}])
def test_what_config_does_not_say_is_left_to_vllm(tmp_path: Path, wrong: dict[str, Any]) -> None:
    assert model_cache(write(tmp_path, **wrong), read_flags([])) is None
    assert model_cache(write(tmp_path), read_flags(["--max-model-len", "auto"])) is None


@pytest.mark.parametrize(
    ("memory", "arguments", "size"),
    [
        (Memory(24 * GIB, 20 * GIB), [], 1025 * 128 * TOKEN),
        (Memory(24 * GIB, 20 * GIB), ["--max-model-len", "1024"], GIB),
        (Memory(2 * GIB, GIB), ["--max-model-len", "1024"], 9 * 128 * TOKEN),
        (Memory(512 * GIB, 500 * GIB), [], None),  # vLLM decides
        (Memory(24 * GIB, 20 * GIB), ["--kv-cache-memory-bytes", "1"], None),
        (Memory(24 * GIB, 20 * GIB), ["--gpu-memory-utilization", "0.5"], None),
        (None, [], None),
    ],
)
def test_vllms_default_unless_it_does_not_fit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    memory: Memory | None,
    arguments: list[str],
    size: int | None,
) -> None:
    monkeypatch.setattr(kv_cache, "free_memory", lambda: memory)
    write(tmp_path)
    assert serving_cache(tmp_path, read_flags(arguments), {}) == ([f"--kv-cache-memory-bytes={size}"] if size else [])
    said = capfd.readouterr().err
    assert said.count("\n") == bool(size)
    assert not size or f"KV cache: {size / GIB:.1f} GiB, for a context of " in said
    assert serving_cache(tmp_path, read_flags(arguments), {"VLLM_CPU_KVCACHE_SPACE": "4"}) == []


@pytest.mark.parametrize(
    ("memory", "context", "needed"), [(Memory(4 * GIB, 2 * GIB), "128K", "2.8 GiB"), (Memory(64 * GIB, 63 * GIB), "4M", "90.0 GiB")]
)
def test_a_context_without_room_is_refused_with_the_one_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: Memory, context: str, needed: str
) -> None:
    monkeypatch.setattr(kv_cache, "free_memory", lambda: memory)
    write(tmp_path)
    with pytest.raises(InputError, match=rf"tokens needs {needed} .* give --max-model-len \d+ or less") as refused:
        serving_cache(tmp_path, read_flags(["--max-model-len", context]), {})
    fits = int(str(refused.value).split("--max-model-len ")[1].split()[0])
    serving_cache(tmp_path, read_flags(["--max-model-len", str(fits)]), {})
    with pytest.raises(InputError, match="tokens needs"):
        serving_cache(tmp_path, read_flags(["--max-model-len", str(fits + 129)]), {})


def test_the_memory_is_this_machines() -> None:
    memory = free_memory()
    assert memory is not None
    assert 0 < memory.free < memory.total
