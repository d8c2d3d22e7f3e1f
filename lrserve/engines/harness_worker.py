"""The process around lm-evaluation-harness: `python -m lrserve.engines.harness_worker` (harness.py starts it)."""

from __future__ import annotations

import difflib
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lrserve.engines.protocol import serve
from lrserve.errors import InputError, one_line
from lrserve.inputs.source import Source

_LONGEST: Final = 4096  # tokens of context: a longer one only costs KV cache; both models get the same
_CPU_BATCH: Final = 4  # the harness holds float32 logits of a whole batch
_KV_CACHE_BYTES: Final = 2**30  # on the CPU
_BOOTSTRAP: Final = 1000


@dataclass(frozen=True)
class Loaded:
    """The harness's model, and by what the user called them, its tasks and groups."""

    model: Any
    tasks: dict[str, list[Any]]


def build(settings: dict[str, Any]) -> Loaded:
    """Load the tasks, then the model."""
    if settings["local"]:
        os.environ["HF_DATASETS_CACHE"] = str(Path(tempfile.gettempdir()) / "datasets")  # vanishes with the process
    tasks = load_tasks(settings["tasks"], named=not settings["local"])
    load = load_vllm if settings["engine"] == "vllm" else load_transformers
    return Loaded(load(settings), tasks)


def load_tasks(wanted: list[str], *, named: bool) -> dict[str, list[Any]]:
    """Load tasks and their data; `named`: some of them are the harness's own.

    Raises:
        InputError: no such task, or it cannot be loaded.
    """
    from lm_eval.tasks import TaskManager

    folders = [task for task in wanted if os.path.isdir(task)]
    manager: Any = TaskManager(include_path=folders or None, include_defaults=named)
    found = {}
    for task in wanted:
        if task in folders:
            names = TaskManager(include_path=task, include_defaults=False).all_subtasks
            if not names:
                raise InputError(f"{task} holds no task of lm-evaluation-harness: a .yaml file with an entry 'task'")
        elif os.path.isfile(task) or task in manager.all_tasks:
            names = [task]
        else:
            close = difflib.get_close_matches(task, manager.all_tasks, n=1)
            raise InputError(
                f"no task {task!r} in lm-evaluation-harness"
                + (f"; did you mean {close[0]}?" if close else "; give one of its names, or a YAML file")
            )
        try:
            loaded = manager.load(names)
        except Exception as error:  # whatever YAML, the datasets library, its HTTP client and a task's own code raise
            hint = (
                "check the file; paths in it begin in the current folder"
                if os.path.exists(task)
                else "its data come from the Hugging Face Hub; check the network, or give a YAML file with local data"
            )
            raise InputError(f"task {task} cannot be loaded ({one_line(error)}); {hint}") from None
        inner = {name for names in loaded.get("group_map", {}).values() for name in names}
        objects = {**loaded.get("groups", {}), **loaded["tasks"]}
        found[task] = [thing for name, thing in objects.items() if name not in inner]
    return found


def load_transformers(settings: Mapping[str, Any]) -> Any:
    """Load a model into the harness's class for transformers."""
    import torch
    from lm_eval.models.huggingface import HFLM

    source = Source(settings["model"], Path(settings["model"]))
    model, tokenizer = source.load(getattr(torch, settings["dtype"])), source.tokenizer()
    batch: Any = "auto" if model.device.type == "cuda" else _CPU_BATCH
    return HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch, max_length=_longest(source))


def load_vllm(settings: Mapping[str, Any]) -> Any:
    """Load a model into the harness's class for vLLM."""
    from lm_eval.models.vllm_causallms import VLLM
    from vllm.platforms import current_platform

    options: dict[str, Any] = {}
    if current_platform.is_cpu() and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        options["kv_cache_memory_bytes"] = _KV_CACHE_BYTES
    return VLLM(
        pretrained=settings["model"],
        dtype=settings["dtype"],
        max_model_len=_longest(Source(settings["model"], Path(settings["model"]))),
        enforce_eager=settings["enforce_eager"],
        gpu_memory_utilization=settings["gpu_memory_utilization"],
        tensor_parallel_size=settings["tensor_parallel_size"],
        language_model_only=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **options,
    )


def _longest(source: Source) -> int:
    return min(_LONGEST, getattr(source.config().get_text_config(), "max_position_embeddings", _LONGEST))


def evaluate(loaded: Loaded, task: str, limit: int | None, shots: int | None) -> dict[str, Any]:
    """Run what the user called `task`."""
    from lm_eval import simple_evaluate

    try:
        found = simple_evaluate(
            loaded.model, tasks=loaded.tasks[task], limit=limit, num_fewshot=shots, bootstrap_iters=_BOOTSTRAP, log_samples=True
        )
    except ValueError as error:  # a task that runs code that a model wrote, or has too few examples for the shots
        raise InputError(f"task {task} cannot be run: {one_line(error)}") from error
    return {"tasks": collect(found)}


def collect(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `Harness.evaluate` promises of the harness's results; of a group that has figures of its own, only those."""
    results = {name: _metrics(values) for name, values in found["results"].items()}
    inner = {name for group, names in found.get("group_subtasks", {}).items() if results.get(group) for name in names}
    return {
        name: _task(name, metrics, found) for name, metrics in results.items() if metrics and name not in _closure(inner, found)
    }


def _closure(names: set[str], found: Mapping[str, Any]) -> set[str]:
    """Add what is in the groups among `names`."""
    below = {child for name in names for child in found.get("group_subtasks", {}).get(name, ())}
    return names if below <= names else _closure(names | below, found)


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers among a task's results by `metric,filter`, without their errors."""
    return {
        key: float(value)
        for key, value in values.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float) and math.isfinite(value)
    }


def _task(name: str, metrics: Mapping[str, float], found: Mapping[str, Any]) -> dict[str, Any]:
    values = found["results"][name]
    samples = found.get("samples", {}).get(name, [])
    better = found["higher_is_better"].get(name, {})
    return {
        "items": values.get("sample_len", len({sample["doc_id"] for sample in samples})),
        "shots": found["n-shot"].get(name),
        "chance": _chance(name, samples, found),
        "metrics": {
            key.removesuffix(",none"): {
                "value": value,
                "stderr": _number(values.get(f"{metric}_stderr,{filtered}")),
                "higher_is_better": better.get(metric) is not False,
                "samples": _samples(metric, filtered, samples, value),
            }
            for key, value in metrics.items()
            for metric, _, filtered in [key.partition(",")]
        },
    }


def _samples(metric: str, filtered: str, samples: list[dict[str, Any]], mean: float) -> list[float] | None:
    """Return the metric of each item, in order; None where the reported value is not their mean."""
    chosen = sorted((sample for sample in samples if sample["filter"] == filtered), key=lambda sample: int(sample["doc_id"]))
    values = [_number(sample.get(metric)) for sample in chosen]
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values) or not math.isclose(sum(numbers) / len(numbers), mean, abs_tol=1e-9):
        return None
    return numbers


def _chance(name: str, samples: list[dict[str, Any]], found: Mapping[str, Any]) -> float | None:
    if found.get("configs", {}).get(name, {}).get("output_type") != "multiple_choice" or not samples:
        return None
    return sum(1 / len(sample["arguments"]) for sample in samples) / len(samples)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


REQUESTS: Final[dict[str, Callable[..., dict[str, Any]]]] = {"evaluate": evaluate}


def main() -> None:
    """Serve requests until standard input ends."""
    serve(build, REQUESTS)


if __name__ == "__main__":
    main()
