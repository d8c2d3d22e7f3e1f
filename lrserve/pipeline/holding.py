"""What a run holds in memory at the same time, by what the machine has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lrserve.compression.covariance import triangle_size
from lrserve.engines.gpu import both_fit, device_memory, fit
from lrserve.engines.memory import free_memory
from lrserve.engines.runtimes import runtime_of
from lrserve.pipeline.job import Job

ENGINE_BYTES: Final = int(2.5 * 2**30)
"""Of an engine's process besides weights: libraries, keys and values, activations."""
ACTIVATIONS: Final = 20
"""Of a decoder block, for each token, in units of the hidden width: what a forward pass makes and a backward pass needs."""
PROCESS_BYTES: Final = int(0.8 * 2**30)
"""Of lrserve's own process: torch, transformers, optuna."""


@dataclass(frozen=True)
class Holding:
    """What fits.

    engines: the dense model's engine beside a plan's; otherwise they run one after the other.
    tensors: the weights of a plan, and moments of gradients; otherwise they are pages of files in the work folder.
    activations: those of all blocks, for a backward pass; otherwise they are computed again in it.
    reference: the compressed model in float32; otherwise one decoder block at a time.
    engine_in_float32: an engine with the model in float32; otherwise an engine that serves in 16 bits is proved as it serves only.
    """

    engines: bool
    tensors: bool
    activations: bool
    reference: bool
    engine_in_float32: bool

    def __str__(self) -> str:
        return (
            f"engines of the dense model and of a plan {'side by side' if self.engines else 'one after the other'}; "
            f"weights of a plan and moments of gradients {'in memory' if self.tensors else 'in files'}; "
            + ("" if self.activations else "activations computed again in backward passes; ")
            + f"the reference in float32 {'at once' if self.reference else 'block by block'}"
            + ("" if self.engine_in_float32 else "; engines that serve in 16 bits are not proved in float32")
        )


ALL: Final = Holding(engines=True, tensors=True, activations=True, reference=True, engine_in_float32=True)


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
    moments, activations = backward_bytes(job)
    tensors = own + max(weights + engine, moments) <= memory
    room = memory if device is None else min(memory, device)
    return Holding(engines, tensors, own + tensors * moments + activations <= room, own + float32 <= memory, engine_in_float32)


def backward_bytes(job: Job) -> tuple[int, int]:
    """Return the bytes of all moments of gradients, and those of the activations of one backward pass."""
    kinds = job.recipe.factorization.fisher
    if not kinds:
        return 0, 0
    moments = 4 * sum(triangle_size(min(group.n, group.m)) for group in job.groups)
    tokens = min(job.gradient_batch_tokens, job.windows["calibration"].numel())
    return moments, ACTIVATIONS * tokens * job.output_layer[1] * job.dtype.itemsize * job.layers
