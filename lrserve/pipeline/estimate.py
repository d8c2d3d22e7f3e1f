"""What a run will cost: minutes, disk and memory by stage, from sizes and the timed batch of one decoder block."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from lrserve.allocation.speed import calls, shapes_to_measure, token_counts
from lrserve.compression.calibrate import Rehearsal, run_block
from lrserve.compression.covariance import triangle_size
from lrserve.compression.groups import Mixture, family_of
from lrserve.compression.level import SCHEMES, Precision
from lrserve.compression.logits import logits_of
from lrserve.compression.quantize import quantize
from lrserve.engines.onnx_provider import settled
from lrserve.errors import reading
from lrserve.inputs.config_file import keep_one_vision_layer, model_class
from lrserve.inputs.source import device_for
from lrserve.pipeline.holding import ACTIVATIONS, ENGINE_BYTES, PROCESS_BYTES, Holding, backward_bytes, holding
from lrserve.pipeline.job import Job
from lrserve.recipe import Workload
from lrserve.report.card import table
from lrserve.report.console import duration

# Costs over a forward pass of the same tokens, and seconds that no size decides: SmolLM2-135M on two cores, whole stages.
_CALIBRATE: Final = 1.5
_GRADIENTS: Final = 4.5
_TRIAL: Final = 1.2
_REFINE: Final = 4.5
_RECOVER: Final = 2.5
_EAGER_START, _COMPILED_START = 16.0, 75.0  # of vLLM, seconds
_ONNX_START: Final = 3.0
_LAYER_SECONDS: Final = 0.02  # of timing one layer at one number of rows
# decomposing a group, ordering neurons and solving for some of them, over one eigendecomposition of as many inputs
_DECOMPOSE, _ORDER, _SOLVE = 1.5, 0.12, 0.03
_INVERT: Final = 0.1  # rounding to 4 bits, besides each weight's own time, over the same
_RENDERINGS: Final = 4  # of plans for which neurons are solved, besides trials and measured plans: in probes, export and proof
_BYTE_SHARE_INT8: Final = 0.55  # of what dense weights of 16 bits take
_TIMED_OPERATIONS: Final = 2e11  # of the timed batch, at most


@dataclass(frozen=True)
class StageCost:
    """An estimate: seconds, bytes on disk below the work folder (or of the artifact), and bytes of memory in all processes.

    `passing`: further bytes below the work folder, which are there only while the stage runs.
    """

    stage: str
    seconds: float
    disk: int
    memory: int
    passing: int = 0


@dataclass(frozen=True)
class Forward:
    """Seconds of a forward pass: per token of a large batch, of the decoder and of the output layer; and by number of rows."""

    decoder: float
    head: float
    rows: Mapping[int, float]

    @property
    def total(self) -> float:
        """Seconds of a token, output layer included."""
        return self.decoder + self.head


@torch.inference_mode()
def time_forward(job: Job) -> Forward:
    """Time one decoder block of the model's shape, with made-up weights, and scale it by the number of blocks; reads no weights.

    Raises:
        InputError: config.json describes a model that cannot compute.
    """
    with reading(job.source.path / "config.json", "correct the sizes that do not fit together"):
        model = _one_block(job)
        device = next(model.parameters()).device
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device))
    block = sum(group.dense_parameters for group in job.groups if group.layer == 0)
    length = job.recipe.calibration.length
    tokens = min(job.recipe.calibration.batch_tokens, max(64, int(_TIMED_OPERATIONS / (2 * block))))
    windows = torch.zeros(max(1, tokens // length), min(tokens, length), dtype=torch.int64, device=device)

    layers = model.get_submodule(family_of(model.config).layers)
    hidden_size = int(model.config.get_text_config().hidden_size)

    def seconds(ids: torch.Tensor) -> float:
        kwargs = Rehearsal(model, layers, ids)(len(ids), 0)
        states = torch.zeros(*ids.shape, hidden_size, dtype=job.dtype, device=device)
        run_block(layers[0], states, kwargs)  # the first call builds kernels
        return _timed(lambda: run_block(layers[0], states, kwargs))

    hidden = torch.zeros(256, hidden_size, dtype=job.dtype, device=device)
    logits_of(model, hidden)
    head = _timed(lambda: logits_of(model, hidden)) / len(hidden)
    rows = {}
    for count in token_counts(job.recipe.workloads):
        shape = (count, 1) if count < length else (max(1, min(count, tokens) // length), length)
        ids = torch.zeros(shape, dtype=torch.int64, device=device)
        rows[count] = job.layers * seconds(ids) * count / ids.numel() + head * min(count, 256)
    return Forward(job.layers * seconds(windows) / windows.numel(), head, rows)


def _one_block(job: Job) -> Any:
    config = copy.deepcopy(job.source.config())
    of_text = config.get_text_config()
    of_text.num_hidden_layers = 1
    if getattr(of_text, "layer_types", None):
        of_text.layer_types = list(of_text.layer_types)[:1]
    keep_one_vision_layer(config)
    with torch.device("meta"):
        model = model_class(config).from_config(config, dtype=job.dtype)
    model.to_empty(device=device_for(job.dtype))
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.fill_(0.02)
    return model.eval()


def _timed(run: Callable[[], object], times: int = 2) -> float:
    best = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def workload_seconds(workloads: Mapping[str, Workload], forward: Forward) -> float:
    """Return the seconds of one run of every workload with the dense model."""
    return sum(number * forward.rows[rows] for workload in workloads.values() for rows, number in calls(workload).items())


def estimate(job: Job, forward: Forward) -> list[StageCost]:
    """Estimate every stage of a run that reuses nothing."""
    recipe = job.recipe
    settings, search = recipe.factorization, recipe.search
    weights, float32 = job.parameters * job.dtype.itemsize, job.parameters * 4
    hidden = int(job.source.config().get_text_config().hidden_size)
    calibration = job.windows["calibration"].numel()
    batch = min(recipe.calibration.batch_tokens, calibration)
    units = [unit for unit in job.units if not isinstance(unit, Mixture)]
    mixtures = [unit for unit in job.units if isinstance(unit, Mixture)]
    largest = max(max(group.n, min(group.m, group.n)) for group in units)
    of_experts = [4 * mixture.experts * mixture.n**2 for mixture in mixtures]
    covariances = 4 * sum(triangle_size(group.n) for group in job.groups) + sum(of_experts)
    moments, kept = backward_bytes(job)
    spectra = 4 * sum(unit.m * unit.n if unit.fed_by else unit.full_rank * (unit.m + unit.n) for unit in units)
    solved = max(8 * unit.n**2 if unit.fed_by else 8 * 6 * unit.n**2 for unit in units)
    inputs = sum(unit.n**3 for unit in units if unit.fed_by) + sum(mixture.experts * mixture.n**3 for mixture in mixtures)
    cube, cubes = _seconds_per_cube(), sum(unit.full_rank**3 for unit in units if not unit.fed_by)
    feeding = sum(unit.fed_by.m * unit.fed_by.n for unit in units if unit.fed_by)
    trained = 4 * (sum(unit.full_rank * (unit.m if unit.fed_by else unit.m + unit.n) for unit in units) + feeding)
    activations = ACTIVATIONS * batch * hidden * job.dtype.itemsize
    compiled = recipe.engine.runtime == "vllm" and not recipe.engine.enforce_eager
    start = _ONNX_START if recipe.engine.runtime == "onnx" else _COMPILED_START if compiled else _EAGER_START
    run = workload_seconds(recipe.workloads, forward)
    refined = settings.refine_tokens or calibration // 4
    engine, held = weights + ENGINE_BYTES, holding(job)

    costs = [
        StageCost(
            "2 calibrate",
            _CALIBRATE * calibration * forward.decoder,
            2 * calibration * hidden * job.dtype.itemsize + covariances,
            weights + activations + 3 * 4 * largest**2 + 2 * max(of_experts, default=0),
        )
    ]
    if settings.fisher:
        tokens = min(settings.fisher_tokens, calibration)
        seconds = (_GRADIENTS + (not held.activations)) * tokens * forward.total
        kept = kept if held.activations else kept // job.layers
        disk = (2 + (not held.tensors)) * moments
        costs.append(StageCost("2 gradients", seconds, disk, weights + held.tensors * moments + kept))
    costs.append(StageCost("3 factorize", (_DECOMPOSE * cubes + _ORDER * inputs) * cube, spectra, weights + solved))
    precisions = 1 + len(job.precisions)  # at most
    probes = precisions * len(job.units) * search.probe_tokens * (forward.decoder / 2 + forward.head)
    judged = search.trials * search.validation_tokens + 2 * min(search.validation_pool, job.windows["validation"].numel())
    weighed = bool(settings.fisher) and any(SCHEMES[precision].bits < 8 for precision in job.precisions)
    weighing = weighed * _CALIBRATE * min(settings.fisher_tokens, calibration) * forward.decoder
    solving = (search.trials + search.measured_plans + _RENDERINGS) * _SOLVE * inputs * cube
    searched = probes + _TRIAL * judged * forward.total + weighing + _rounding(job, cube) + solving
    logits = 4 * search.probe_tokens * int(job.source.config().get_text_config().vocab_size)
    linears = sum(group.m * group.n for group in job.groups)
    rounded = len(job.precisions) * linears  # a byte each
    in_files = 0 if held.tensors else linears * job.dtype.itemsize
    share = _byte_share(job)
    tried = weights + held.tensors * weights + activations + logits
    costs.append(StageCost("4 search", searched, rounded + weighed * covariances, tried + held.engines * engine, in_files))
    cells = len(shapes_to_measure(job.units, job.offers, job.output_layer)) * len(token_counts(recipe.workloads))
    costs.append(StageCost("4 latency", start + 3 * run + _LAYER_SECONDS * cells, 0, weights + engine))
    measured = (search.measured_plans + 2) * (start + 2 * (1 + recipe.engine.repeats) * run)
    graph = job.parameters * getattr(torch, str(settled(recipe.engine).onnx_dtype)).itemsize if "onnx" in recipe.export else 0
    proven_by = graph + (float32 if 0 < graph < float32 else 0)  # the dense model's, and where numbers are rounded a float32 one
    plan = weights - round((1 - share) * linears * job.dtype.itemsize)
    rendered = round(share * in_files)
    costs.append(StageCost("4 measure", measured, proven_by, weights + (1 + held.engines) * engine, plan + rendered))
    seconds, disk, memory = 0.0, 0, 0
    if settings.refinement != "none":
        walks = 1 + bool(settings.weights)  # at most: of the factors, and of what rounding leaves
        seconds = walks * (_REFINE * settings.refine_steps * batch + 3 * refined) * forward.decoder
        disk, memory = trained, 2 * weights + activations * 4
    if settings.recovers:
        processes = job.recovery_processes
        seconds += 60 * settings.recover_minutes + _RECOVER * settings.recover_tokens * forward.total / processes
        disk = 3 * trained + (4 * settings.recover_tokens if recipe.text.recovery else 0)
        whole = 2 * weights + 4 * trained
        sharded = processes > 1 and job.recovery_sharded  # each builds the student before it keeps a part
        memory = whole + processes * (weights + trained) if sharded else processes * whole
    if seconds:
        costs.append(StageCost("5 improve", seconds, disk, memory))
    proof = 2 * job.windows["report"].numel() * forward.total
    proof += (_EAGER_START + start) * ("vllm" in recipe.export) + 2 * _ONNX_START * ("onnx" in recipe.export)
    artifact = plan * ("vllm" in recipe.export) + graph
    costs.append(StageCost("6 export and prove", proof, artifact, weights + _proof(weights, float32, held), rendered))
    return [replace(cost, memory=cost.memory + PROCESS_BYTES) for cost in costs]


def _rounding(job: Job, cube: float) -> float:
    """Return the seconds in which weights are rounded: all to each precision, once judged and once measured; and in other plans."""
    entries = sum(group.m * group.n for group in job.groups)
    inputs = sum(group.n**3 for group in job.groups)
    once = [entries * _seconds_per_weight(p) + _INVERT * inputs * cube * (SCHEMES[p].bits < 8) for p in job.precisions]
    return 2 * sum(once) + (job.recipe.search.measured_plans + 1) * max(once, default=0.0)


def _seconds_per_weight(precision: Precision) -> float:
    m, n = 256, 1024
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    return _timed(lambda: quantize(W, precision)) / (m * n)


def _byte_share(job: Job) -> float:
    """Return the most that a plan may keep of the bytes of the decoder's linears: less than all where the target says so."""
    target = job.recipe.target
    asked = target.max_bytes or 1 - (target.ratio or 0.0)
    return max(asked, _BYTE_SHARE_INT8) if job.precisions else asked  # which everywhere is measured as well


def disk_needed(costs: Sequence[StageCost]) -> list[tuple[int, int]]:
    """Return the bytes in the work folder and in the artifact: at the fullest moment before the export, and at that."""
    *before, export = costs
    stays = sum(cost.disk for cost in before)
    return [(stays + max(cost.passing for cost in before), 0), (stays + export.passing, export.disk)]


def _proof(weights: int, float32: int, held: Holding) -> int:
    """Return the bytes of what computes in the proof: the reference, and then an engine."""
    return max(float32 if held.reference else 0, (float32 if held.engine_in_float32 else weights) + ENGINE_BYTES)


def _seconds_per_cube() -> float:
    """Seconds of an eigendecomposition (n, n) in float64, over n^3."""
    n = 384
    matrix = torch.cov(torch.randn(n, 2 * n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    torch.linalg.eigh(matrix)
    return _timed(lambda: torch.linalg.eigh(matrix), 10) / n**3  # so short that others on the machine disturb it


def in_words(costs: Sequence[StageCost]) -> str:
    """Return the estimate as one sentence."""
    total = sum(cost.seconds for cost in costs)
    disk, memory = max(map(sum, disk_needed(costs))), max(cost.memory for cost in costs)
    return (
        f"estimate, if nothing is reused: about {duration(total)}, {disk / 1e9:.1f} GB of disk, and {memory / 1e9:.1f} GB of "
        "memory in all processes together"
    )


def by_stage(costs: Sequence[StageCost]) -> str:
    """Return the estimate as a table."""
    rows = [[c.stage, duration(c.seconds), f"{(c.disk + c.passing) / 1e9:.2f} GB", f"{c.memory / 1e9:.2f} GB"] for c in costs]
    return table(["stage", "time", "disk", "memory, all processes"], rows)
