"""Whether the engines of a run can run its model: tried, before any work, on two layers with random weights.

What an engine builds depends on its version and on the machine: head sizes, activations, windows, biases. A list of what works
would be wrong with the next release, so the engine itself is asked, and its transcripts are compared with transformers'.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch

from exporters.base import Exporter, SelfProving
from lrserve.compression.level import SCHEMES
from lrserve.engines.runtimes import Runtime, loader_of, runtime_of
from lrserve.engines.timing import random_prompts
from lrserve.engines.transcripts import transcribe_checkpoint, transcribe_model
from lrserve.errors import ArtifactError, EngineError, InputError, UnsupportedModelError, listed, reading
from lrserve.inputs.config_file import keep_one_vision_layer, model_class
from lrserve.inputs.source import cache_folder, cache_place
from lrserve.pipeline.agreement import FACTOR, Pair, differences
from lrserve.pipeline.job import Job
from lrserve.recipe import Workload
from lrserve.report.console import progress_bar
from lrserve.report.machine import machine
from lrserve.storage.space import Place, require_space
from lrserve.storage.store import fingerprint, write_json
from lrserve.storage.temporary import temporary_folder

_LAYERS: Final = 2
_VOCABULARY: Final = 1024  # tokens: no engine depends on their number, and time and disk do
_PROMPTS, _NEW_TOKENS = 2, 4
_PROMPT_TOKENS: Final = 24  # at most
_ADVICE: Final = "choose another engine (--target, --export) or another model"
_MARK_BYTES: Final = 1_000_000  # of what is kept in the cache, with room


def require_divisible(job: Job) -> None:
    """Check that the GPUs among which vLLM divides an MLP, or each expert, get equal parts of every number of neurons.

    Raises:
        InputError: `search.width_step` does not divide.
    """
    recipe, (_, width_step) = job.recipe, job.steps
    gpus = recipe.engine.tensor_parallel_size
    narrows = recipe.structure == "narrow" or len(job.observed) > len(job.groups)
    if gpus == 1 or not narrows or "vllm" not in (recipe.engine.runtime, *recipe.export):
        return
    step = gpus * max([SCHEMES[precision].group or 1 for precision in job.precisions], default=1)
    if width_step % step:
        raise InputError(
            f"search.width_step {width_step}: {gpus} GPUs (engine.tensor_parallel_size) divide an MLP evenly, and the weights of "
            f"{listed(job.precisions, ', ') or recipe.engine.dtype} in whole groups, only in steps of {step} neurons; set "
            f"search.width_step: {-(-width_step // step) * step}"
        )


def require_engines(job: Job, exporters: Sequence[Exporter]) -> None:
    """See that every engine of the run builds two layers of the model, and computes what transformers computes.

    An engine's success is kept in the cache, by the model's config, the engine's version and the machine, so that it starts once.

    Raises:
        UnsupportedModelError: an engine cannot run the model, or computes something else.
        ArtifactError: the cache or the folder for temporary files cannot be written, or has no room.
    """
    engine = job.recipe.engine.model_copy(update={"enforce_eager": True})
    asked = [runtime_of(engine), *(loader_of(exporter, engine) for exporter in exporters if not isinstance(exporter, SelfProving))]
    runtimes = {runtime.name: runtime for runtime in asked}
    config = _two_layers(job)
    marks = {name: cache_folder() / "engines" / f"{name}-{_identity(config, runtime)}.json" for name, runtime in runtimes.items()}
    require_space([cache_place(_MARK_BYTES), _temporary_place(config, job.dtype)])
    untried = [name for name, mark in marks.items() if not mark.is_file()]
    if not untried:
        return
    with progress_bar(len(untried), f"1/6 engines: trying {' and '.join(untried)} on {_LAYERS} random layers") as progress:
        model = _random_model(config, job.dtype)
        for done, name in enumerate(untried, 1):
            _try(job, model, runtimes[name])
            marks[name].parent.mkdir(parents=True, exist_ok=True)
            write_json(marks[name], {"engine": runtimes[name].version})
            progress(done)
    job.say(f"1/6 engines: {' and '.join(runtimes[name].version for name in untried)} can run this model")


def _temporary_place(config: Any, dtype: torch.dtype) -> Place:
    with reading("TMPDIR", "set it to a folder that you may write to", ArtifactError):
        folder = Path(tempfile.gettempdir()).absolute()
    with torch.device("meta"):
        entries = sum(parameter.numel() for parameter in model_class(config).from_config(config).parameters())
    return Place("temporary files (TMPDIR)", folder, entries * (4 + dtype.itemsize))


def _two_layers(job: Job) -> Any:
    """Return the model's config with two layers, of both kinds where there are two, few tokens, and one layer that reads images."""
    whole = copy.deepcopy(job.source.config())
    config = whole.get_text_config()
    for name in ("layer_types", "no_rope_layers"):
        if kinds := list(dict.fromkeys(getattr(config, name, None) or ())):
            setattr(config, name, (kinds * _LAYERS)[:_LAYERS] if len(kinds) == 1 else kinds[:_LAYERS])
    if (last := getattr(config, "max_window_layers", None)) is not None:
        config.max_window_layers = min(last, 1) if last < config.num_hidden_layers else _LAYERS
    config.num_hidden_layers = _LAYERS
    config.vocab_size = min(config.vocab_size, _VOCABULARY)
    for part in (whole, config):
        part.bos_token_id = part.eos_token_id = 0
        part.pad_token_id = None
    keep_one_vision_layer(whole)
    return whole


def _identity(config: Any, runtime: Runtime) -> str:
    here = {name: value for name, value in machine().items() if name in ("processor", "instructions", "gpu")}
    packages = {name: metadata.version(name) for name in ("lrserve", "torch", "transformers")}
    described = {"config": config.to_json_string(), "engine": runtime.version, "dtype": runtime.dtype, **here, **packages}
    return fingerprint(described)[:16]


def _random_model(config: Any, dtype: torch.dtype) -> Any:
    """Build the model in float32, of values of a dtype, so that its outputs depend visibly on every weight and bias."""
    model = model_class(config).from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
            else:
                parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.3, generator=generator)
            parameter.copy_(parameter.to(dtype))
    return model


def _try(job: Job, model: Any, runtime: Runtime) -> None:
    exporter = runtime.exporter
    config = model.config.get_text_config()
    prompt_tokens = min(_PROMPT_TOKENS, int(config.max_position_embeddings) - _NEW_TOKENS)
    prompts = random_prompts(config.vocab_size, prompt_tokens, _PROMPTS, seed=0)
    workload = Workload(prompt_tokens=prompt_tokens, output_tokens=_NEW_TOKENS, concurrency=_PROMPTS)
    exact = transcribe_model(model, prompts, _NEW_TOKENS)
    with temporary_folder() as folder:
        place = Path(folder)
        exporter.export(model, job.source.path, place, job.dtype)
        (place / "generation_config.json").unlink(missing_ok=True)  # its end tokens may be none of these few
        dtype = getattr(torch, runtime.dtype)
        reference = exact if dtype is torch.float32 else transcribe_checkpoint(place, dtype, prompts, _NEW_TOKENS)
        try:
            with runtime.open(place, {"": workload}, log=place / "engine.log") as engine:
                found = differences(Pair(reference, engine.transcribe(prompts, _NEW_TOKENS)))
        except EngineError as error:
            reason = str(error).partition("\n")[0].replace(str(place), "two random layers of it")
            raise UnsupportedModelError(
                f"{runtime.version} cannot run this model on this machine: {reason[:300]}; {_ADVICE}"
            ) from error
    rounding = differences(Pair(exact, reference)).mean
    bound = FACTOR * rounding + exporter.tolerance
    if math.isfinite(rounding) and not found.mean <= bound:  # written so that a NaN of the engine fails
        raise UnsupportedModelError(
            f"{runtime.version} computes something else than transformers from this model's config.json: on two random layers log "
            f"probabilities differ by {found.mean:.2g} nats on average (bound {bound:.2g}); {_ADVICE}"
        )
