"""What a run holds in memory at the same time, by what the machine has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lrserve.engines.gpu import both_fit, device_memory, fit
from lrserve.engines.memory import free_memory
from lrserve.engines.runtimes import runtime_of
from lrserve.pipeline.job import Job

ENGINE_BYTES: Final = int(2.5 * 2**30)
"""Of an engine's process besides weights: libraries, keys and values, activations."""
PROCESS_BYTES: Final = int(0.8 * 2**30)
"""Of lrserve's own process: torch, transformers, optuna."""


@dataclass(frozen=True)
class Holding:
    """What fits.

    engines: the dense model's engine beside a plan's; otherwise they run one after the other.
    plan: the weights of a plan; otherwise they are pages of files in the work folder.
    reference: the compressed model in float32; otherwise one decoder block at a time.
    engine_in_float32: an engine with the model in float32; otherwise an engine that serves in 16 bits is proved as it serves only.
    """

    engines: bool
    plan: bool
    reference: bool
    engine_in_float32: bool

    def __str__(self) -> str:
        return (
            f"engines of the dense model and of a plan {'side by side' if self.engines else 'one after the other'}; "
            f"weights of a plan {'in memory' if self.plan else 'in files'}; "
            f"the reference in float32 {'at once' if self.reference else 'block by block'}"
            + ("" if self.engine_in_float32 else "; engines that serve in 16 bits are not proved in float32")
        )


ALL: Final = Holding(engines=True, plan=True, reference=True, engine_in_float32=True)


def holding(job: Job) -> Holding:
    """Decide what a run holds, by the recipe's `memory` and that of the GPU."""
    weights, float32 = job.parameters * job.dtype.itemsize, 4 * job.parameters
    found = free_memory()
    memory = job.recipe.memory * 2**30 if job.recipe.memory else found.total if found else float("inf")
    engine, own = weights + ENGINE_BYTES, PROCESS_BYTES + weights
    runtime, device = runtime_of(job.recipe.engine), device_memory()
    if device is not None and runtime.on_gpu:
        share, devices = job.recipe.engine.gpu_memory_share, job.recipe.engine.tensor_parallel_size
        engines = both_fit(weights, device, share, devices)
        engine_in_float32 = fit(float32, device, share, devices)
    else:
        engines = PROCESS_BYTES + 2 * engine <= memory
        engine_in_float32 = own + float32 + ENGINE_BYTES <= memory
    plan = own + weights + engine <= memory
    return Holding(engines, plan, own + float32 <= memory, engine_in_float32)
