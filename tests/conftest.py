"""What tests of several rooms share: vLLM engines that start quickly, and an order that keeps both workers of pytest busy."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import forked_worker
import pytest
from vllm_engine import BATCH, BLOCK, FeatureEngine, Serving

from lrserve.engines import vllm as engine_module
from lrserve.engines.vllm import worker_environment

LONGEST = ("test_pipeline.py", "test_vllm_features.py", "test_real_model.py", "test_vllm_rounded.py")
"""Modules of a minute or more, the longest first. A module stays with one worker, so the last one to begin had better be short."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long modules, then those that start engines."""
    engines = {item.path for item in items if item.get_closest_marker("engine")}

    def place(item: pytest.Item) -> tuple[int, bool]:
        name = item.path.name
        return LONGEST.index(name) if name in LONGEST else len(LONGEST), item.path not in engines

    items.sort(key=place)


@pytest.fixture(scope="session")
def forked_workers() -> Iterator[str]:
    """Where a process that has imported vLLM listens, to fork workers (forked_worker.py)."""
    with tempfile.TemporaryDirectory(prefix="lrserve-tests-") as folder:  # pytest's folders have too long a name for a socket
        address = f"{folder}/workers"
        command = [sys.executable, forked_worker.__file__, "listen", address]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, env=worker_environment(folder, None), **pipes) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.read(1) == b"."
            yield address
            process.stdin.close()


@pytest.fixture(scope="module")
def forked_engines(forked_workers: str) -> Iterator[None]:
    """Let the engines of a module's tests have forked workers; they are lrserve's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "WORKER_COMMAND", forked_worker.command(forked_workers, "lrserve.engines.vllm_worker"))
        yield


@pytest.fixture(scope="session")
def serving(forked_workers: str) -> Serving:
    """Serve a folder by a vLLM engine: `serving(folder, extra=..., **options of Engine)` is a context manager."""
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else vLLM wants a NUMA node for each rank
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "VLLM_USE_AOT_COMPILE": "0",  # otherwise every artifact leaves a folder in the user's cache
    }
    defaults = {"dtype": "float32", "max_model_len": 192, "max_num_seqs": 4, "max_num_batched_tokens": BATCH, "threads": 1}

    @contextmanager
    def serve(folder: Path, *, extra: dict[str, Any] | None = None, **options: Any) -> Iterator[FeatureEngine]:
        extra = {"enable_prefix_caching": True, "block_size": BLOCK, **(extra or {})}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            engine = FeatureEngine(folder, forked_workers, extra=extra, **{"kv_cache_gib": 0.05, **defaults, **options})
        with engine:
            try:
                yield engine
            finally:
                if options.get("tensor_parallel_size", 1) > 1:
                    engine.shut_down()

    return serve
