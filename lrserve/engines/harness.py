"""lm-evaluation-harness over one model, in a process of its own (engines/protocol.py), with transformers or vLLM.

The process keeps the model's memory apart from this one's, and what the harness prints out of the answer. The worker is
engines/harness_worker.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from lrserve.engines.protocol import EngineProcess
from lrserve.engines.vllm import worker_environment
from lrserve.plugins.versions import eval_version, require_eval

WORKER_COMMAND: Final = (sys.executable, "-m", "lrserve.engines.harness_worker")
_WEEK: Final = 7 * 24 * 3600.0


class Harness(EngineProcess):
    """A model under lm-evaluation-harness in a subprocess, as a context manager.

    Args:
        model: an lrserve artifact or a dense model; a folder.
        tasks: each a name of the harness, a YAML file, or a folder of them.
        engine: `transformers` or `vllm`.
        dtype: `bfloat16`, `float16` or `float32`.
        enforce_eager: vLLM without torch.compile.
        gpu_memory_utilization, tensor_parallel_size: as of vLLM's `Engine`.
        log: file that takes everything that the process prints; None is a temporary file, deleted on a clean end.

    Raises:
        InputError: no such task, or its data cannot be had.
        EngineError: the harness is missing, or failed; the message ends with the last lines of its log.
    """

    engine = "lm-evaluation-harness"
    layer_dtype = "bfloat16"

    def __init__(
        self,
        model: Path,
        tasks: Sequence[str],
        *,
        engine: str,
        dtype: str,
        enforce_eager: bool = True,
        gpu_memory_utilization: float = 0.9,
        tensor_parallel_size: int = 1,
        log: Path | None = None,
    ) -> None:
        local = all(Path(task).exists() for task in tasks)
        environment = worker_environment(str(model), None)
        if not local:
            environment["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "0")  # the tasks' data come from there
        super().__init__(
            model,
            {
                "model": str(model),
                "tasks": list(tasks),
                "local": local,
                "engine": engine,
                "dtype": dtype,
                "enforce_eager": enforce_eager,
                "gpu_memory_utilization": gpu_memory_utilization,
                "tensor_parallel_size": tensor_parallel_size,
            },
            environment,
            log=log,
            start_timeout=_WEEK,  # the data of many tasks may have to be fetched
            request_timeout=_WEEK,
            report=None,
        )

    def start(self) -> None:
        """Start the process, and wait until the tasks and the model are loaded."""
        require_eval()
        self._start(WORKER_COMMAND, eval_version())

    def evaluate(self, task: str, *, limit: int | None = None, shots: int | None = None) -> dict[str, Any]:
        """Return the results of one of the tasks, or of each task in it.

        Args:
            task: one of those that were loaded, by the same words.
            limit: items of each task; all when None.
            shots: examples before each item; the task's own number when None.

        Returns:
            By task: `items`, `shots`, `chance` (the share that guessing gets right; None where items have no choices), and
            `metrics`: by name, `value`, `stderr` (None where the harness has none), `higher_is_better`, and `samples`, the values
            of the items of which `value` is the mean (None where it is not one).
        """
        found: dict[str, Any] = self._request("evaluate", task=task, limit=limit, shots=shots)["tasks"]
        return found
