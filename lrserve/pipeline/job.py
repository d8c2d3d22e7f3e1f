"""One run's opened inputs: what every stage of the pipeline reads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lrserve.allocation.plan import Offers, Plan
from lrserve.compression.assemble import PlanSource, compress_model
from lrserve.compression.embedding import round_embedding
from lrserve.compression.filed import IN_MEMORY, Filed
from lrserve.compression.groups import Group, Mixture, allocated, family_of, find_units
from lrserve.compression.level import Precision
from lrserve.compression.repair import Repairs
from lrserve.compression.rounding import Rounding
from lrserve.inputs.config_file import require_known_tokens
from lrserve.inputs.source import Source, device_for, open_source
from lrserve.inputs.stream import origin_fingerprint
from lrserve.inputs.text import Documents, load_texts, shortage, token_windows
from lrserve.pipeline.context import context_length, fitted
from lrserve.pipeline.launched import Launch
from lrserve.plugins.versions import require_sound_torchvision
from lrserve.recipe import Recipe
from lrserve.report.console import Say

_EMBEDDING_BLOCK = 32  # the hidden width of a rounded embedding is a multiple of this
WORK_VERSION = 3
"""Version of the computation kept in work folders: raised when the same inputs would give other numbers."""
_EXPERTS_VERSION = 1
"""As WORK_VERSION, of what is collected of experts."""


@dataclass(frozen=True)
class Job:
    """A recipe with its model and texts opened.

    `observed` are the model's groups and mixtures of experts, in layer order; `groups` the groups alone; `units` what a plan of the
    recipe's structure decides on. `parameters` are those of the dense model, tied weights counted once. `output_layer` is the shape
    (m, n) of the output layer's weight. `windows` holds int64 token windows by use: calibration, validation, report, prompts;
    `fingerprints` identify the content of the model and of each text. `held_out` are the documents that nothing may be trained on.
    `filed` is where weights of compressed models are. `launch` are the processes that a launcher started, if one did.
    """

    recipe: Recipe
    source: Source
    architecture: str
    observed: list[Group]
    parameters: int
    output_layer: tuple[int, int]
    windows: dict[str, torch.Tensor]
    fingerprints: dict[str, str]
    calibration_text: Documents
    held_out: frozenset[str]
    say: Say
    filed: Filed = IN_MEMORY
    launch: Launch | None = None

    @property
    def groups(self) -> list[Group]:
        """The fused groups."""
        return [group for group in self.observed if not isinstance(group, Mixture)]

    @property
    def units(self) -> list[Group]:
        """What a plan allocates (`groups.allocated`)."""
        return allocated(self.observed, self.recipe.structure)

    @property
    def offers(self) -> Offers:
        """The levels that the recipe allows; what the engine cannot run is not known yet."""
        settings = self.recipe.factorization
        step, width_step = self.steps
        rounded = self.precisions, settings.residuals, self.embedding
        return Offers(step, settings.structure, *rounded, width_step=width_step)

    @property
    def steps(self) -> tuple[int, int]:
        """Of which ranks, and numbers of neurons, are multiples."""
        return self.recipe.search.steps(gpu=torch.cuda.is_available())

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """What weights may be rounded to."""
        asked = self.recipe.factorization.weights
        return asked if asked is not None else ("int8", "int4_g32", *(("fp8",) if torch.cuda.is_available() else ()))

    @property
    def embedding(self) -> Precision | None:
        """What the embedding and the output layer are rounded to: nothing where vLLM serves, which has no kernels for it."""
        if self.recipe.engine.runtime != "onnx" or self.output_layer[1] % _EMBEDDING_BLOCK:
            return None
        asked = self.recipe.factorization.embedding
        if asked is None:
            return "int8" if self.precisions else None
        return None if asked == "none" else asked

    @property
    def layers(self) -> int:
        """Number of decoder blocks."""
        return max(group.layer for group in self.observed) + 1

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the model is calibrated, stored and served."""
        dtype: torch.dtype = getattr(torch, self.recipe.engine.dtype)
        return dtype

    def provenance(self) -> dict[str, Any]:
        """Identify everything that decides the result; JSON."""
        settings = self.recipe.model_dump(mode="json", exclude={"model", "text", "memory"})  # content counts, not place
        return {"recipe": settings, "content": self.fingerprints, "work_version": WORK_VERSION}

    def calibration_inputs(self) -> dict[str, Any]:
        """Identify what the covariances depend on; JSON."""
        settings = self.recipe.calibration.model_dump(mode="json", exclude={"batch_tokens"})
        experts = {"experts": _EXPERTS_VERSION} if len(self.observed) > len(self.groups) else {}
        return {**self.model_inputs(), "windows": tensor_sha256(self.windows["calibration"]), **settings, **experts}

    def model_inputs(self) -> dict[str, Any]:
        """Identify the model and the dtype that it is used in; JSON."""
        return {"version": WORK_VERSION, "model": self.fingerprints["model"], "dtype": self.recipe.engine.dtype}

    @property
    def gradient_batch_tokens(self) -> int:
        """Tokens in one backward pass: fewer than in a forward pass, since activations are kept for the way back."""
        return max(1, self.recipe.calibration.batch_tokens // 2)

    @property
    def recovery_processes(self) -> int:
        """How many processes recover together."""
        if self.launch is not None:
            return self.launch.count
        return self.recipe.factorization.recover_processes or max(1, torch.cuda.device_count())

    @property
    def recovery_sharded(self) -> bool:
        """Whether each of several such processes keeps a part of the models in place of copies."""
        asked = self.recipe.factorization.recover_sharded
        return device_for(self.dtype) == "cuda" if asked is None else asked

    def recovery_windows(self) -> torch.Tensor:
        """Cut all of the calibration text into windows: training goes through more of it than the covariances need."""
        return token_windows(self.source.tokenizer(), self.calibration_text, self.recipe.calibration.length)

    def compressed_model(
        self,
        plan: Plan,
        factors: PlanSource,
        rounding: Rounding | None = None,
        repairs: Repairs | None = None,
        units: Sequence[Group] | None = None,
    ) -> Any:
        """Build the compressed model in the dtype in which it is stored.

        `repairs` are what an improvement left of these factors; `units` are the plan's, if they are no fused groups.
        """
        changed = plan.changed(allocated(self.observed, plan.structure) if units is None else units)
        model = self.source.load(self.dtype)
        compressed = compress_model(model, changed, plan.structure, factors, self.dtype, rounding, self.filed)
        if plan.embedding:
            round_embedding(compressed, plan.embedding, self.dtype)
        return compressed if repairs is None else repairs.apply(compressed)


def first_tokens(windows: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return the first of windows (sequences, length) that so many tokens fill; at least one."""
    return windows[: max(1, tokens // windows.shape[1])]


def open_job(recipe: Recipe, say: Say) -> Job:
    """Open the model and the texts of a recipe; reads no weight but a GGUF file's, which is converted once.

    The job's recipe is the given one with defaults that fit into the model's context.

    Raises:
        InputError, UnsupportedModelError: what cannot be used, and what to do.
        EngineError: transformers cannot work here (`versions.require_sound_torchvision`).
    """
    require_sound_torchvision()
    source = open_source(recipe.model, accept=family_of)
    config = source.config()
    require_known_tokens(source.path)
    skeleton = source.skeleton()
    of_text = config.get_text_config()
    observed, rows = find_units(skeleton), int(of_text.vocab_size)
    recipe = fitted(recipe, context_length(of_text, {recipe.engine.runtime, *recipe.export}), say)
    tokenizer = source.tokenizer()
    texts = load_texts(recipe.text.sources, recipe.text.validation, recipe.text.report, tokenizer)
    for note in texts.notes:
        say(note)
    calibration, search, report = recipe.calibration, recipe.search, recipe.report

    def cut(documents: Documents, length: int, count: int, setting: str, effect: str, **choice: int) -> torch.Tensor:
        found = token_windows(tokenizer, documents, length, count, rows=rows, **choice)
        if warning := shortage(documents, found, count, setting, effect):
            say(warning)
        return found

    judged = max(1, max(search.validation_tokens, search.probe_tokens) // search.validation_length)
    pool = search.validation_pool // search.validation_length
    windows = {
        "calibration": cut(
            texts.calibration,
            calibration.length,
            calibration.sequences,
            "calibration.sequences",
            "The factors fit so little text more closely than other text",
            seed=recipe.seed,
        ),
        "validation": cut(
            texts.validation,
            search.validation_length,
            judged,
            "search.validation_tokens",
            "The search tells plans apart less surely",
            up_to=pool,
        ),
        "report": cut(
            texts.report,
            report.length,
            max(1, report.tokens // report.length),
            "report.tokens",
            "The reported perplexity is less certain",
        ),
        "prompts": cut(
            texts.report, report.prompt_tokens, report.prompts, "report.prompts", "The renderings are compared on fewer prompts"
        ),
    }
    return Job(
        recipe=recipe,
        source=source,
        architecture=config.architectures[0],
        observed=observed,
        parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
        output_layer=tuple(skeleton.get_output_embeddings().weight.shape),
        windows=windows,
        fingerprints={
            "model": source.fingerprint(),
            "calibration": texts.calibration.fingerprint(),
            "validation": texts.validation.fingerprint(),
            "report": texts.report.fingerprint(),
            **({"recovery": origin_fingerprint(recipe.text.recovery)} if recipe.text.recovery else {}),
        },
        calibration_text=texts.calibration,
        held_out=frozenset([*texts.validation.texts, *texts.report.texts]),
        say=say,
    )


def tensor_sha256(tensor: torch.Tensor) -> str:
    """Return sha256 of a tensor's shape and values, as hex."""
    return hashlib.sha256(str(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes()).hexdigest()
