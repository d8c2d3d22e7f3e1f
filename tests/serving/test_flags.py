from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lrserve.errors import InputError
from lrserve.serving.flags import read_flags, without


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ([], {}),
        (["--port", "1", "--enforce-eager", "-O3"], {"port": "1"}),
        (["--port=1", "--port", "2"], {"port": "2"}),
        (["--max_model_len", "4k"], {"max-model-len": "4k"}),
        (["--max-model-le=4k"], {"max-model-len": "4k"}),
        (["--api-key", "a", "b", "--served-model-name", "c"], {"api-key": ["a", "b"], "served-model-name": ["c"]}),
        (["--device-memory-utilization=0.5", "-tp", "2"], {"gpu-memory-utilization": "0.5", "tensor-parallel-size": "2"}),
        (["--hf-overrides", '{"--host": 1}', "--lora-modules", "a=b", "c=d"], {}),
        (["--hf-overrides.rope_theta", "1", "--max-num-seqs", "-1", "--headless"], {"headless": True}),
        (["--config", "f.yaml"], {"host": "h", "port": 9000, "api-key": ["k"], "gpu-memory-utilization": 0.5}),
        (["--config", "f.yaml", "--port=1"], {"host": "h", "port": "1", "api-key": ["k"], "gpu-memory-utilization": 0.5}),
        (["--config=f.yaml"], {}),  # as in vLLM
    ],
)
def test_flags_are_read_as_vllm_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], given: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("f.yaml").write_text("host: h\nport: 9000\napi_key: k\nheadless: false\ndevice-memory-utilization: 0.5\nseed: 1\n")
    assert read_flags(arguments).given == given


def test_the_rest_keeps_its_order() -> None:
    arguments = [
        "-tp=2",
        "--api-key",
        "a",
        "b",
        "--lora-modules",
        "c=d",
        "e=f",
        "--host=h",
        "--served_model_name",
        "n",
        "--seed",
        "-1",
    ]
    assert without(arguments, "api-key", "host", "served-model-name") == ["-tp=2", "--lora-modules", "c=d", "e=f", "--seed", "-1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host"], "argument --host: expected one argument"),
        (["--api-key"], "argument --api-key: expected at least one argument"),
        (["--config"], "--config needs a file"),
        (["--config", "none.yaml"], "--config none.yaml cannot be read: .*No such file"),
        (["--config", "bad.yaml"], "--config bad.yaml cannot be read"),
        (["--config", "list.yaml"], "--config list.yaml holds no settings"),
    ],
)
def test_what_vllm_would_refuse_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text("a: [\n")
    Path("list.yaml").write_text("- a\n")
    with pytest.raises(InputError, match=message) as refused:
        read_flags(arguments)
    assert "\n" not in str(refused.value)
