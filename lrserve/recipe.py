"""The recipe: every setting of a run in one frozen object, from YAML and the command line, saved with the artifact.

docs/recipe.md is made from these classes (`python docs/generate_recipe.py`): the docstring below a field is its effect, a string
in its `Annotated` type is its unit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from lrserve.compression.groups import KINDS, Kind, Structure
from lrserve.compression.level import Precision
from lrserve.errors import InputError, shown
from lrserve.inputs.origin import on_disk
from lrserve.storage.yaml_files import read_settings

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Dtype = Literal["bfloat16", "float16", "float32"]


_REFINE_STEPS: Final = 25
_PROMPTS_AT_ONCE: Final = 32


_NAMED: Final = 100  # characters of a setting's name, of which a user may make up any
_LARGEST: Final = 2**31 - 1
"""Largest number of any setting: what every library behind it takes for a seed or a count."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _within_reach(cls, value: Any) -> Any:
        for entry in value if isinstance(value, (tuple, dict)) else [value]:
            if isinstance(entry, (int, float)) and abs(entry) > _LARGEST:
                raise ValueError(f"must be at most {_LARGEST}; got {shown(entry)}")
            if isinstance(entry, str) and "\0" in entry:
                raise ValueError(f"must not hold a NUL character; got {shown(entry)}")
        return value


class Target(_Frozen):
    """What is fixed; the search optimises the rest. At most one may be set.

    Without a target the search looks for the front of perplexity and speed, and exports its knee.
    """

    ratio: Annotated[float, Field(gt=0, lt=1), "share"] | None = None
    """Share of the parameters of the decoder's linear layers to remove. The search weighs perplexity against speed
    (`search.speed_weight`)."""
    min_speedup: Annotated[float, Field(gt=0, allow_inf_nan=False), "times dense"] | None = None
    """Least output tokens per second, measured on the engine, over those of the dense model. The search minimises perplexity."""
    max_bytes: Annotated[float, Field(gt=0, lt=1), "share"] | None = None
    """Largest share of the bytes of the decoder's linear layers that may be left: 0.4 stores them in two fifths. The search weighs
    perplexity against speed as for `ratio`."""
    max_ppl_increase: Annotated[float, Field(gt=0, allow_inf_nan=False), "share"] | None = None
    """Largest relative increase of the validation perplexity: 0.05 allows 5 %. The search maximises speed."""

    @model_validator(mode="before")
    @classmethod
    def _at_most_one(cls, data: Any) -> Any:
        given = [name for name, value in data.items() if value is not None] if isinstance(data, dict) else []
        if len(given) > 1:
            raise ValueError(f"give only one of ratio, min_speedup, max_bytes and max_ppl_increase, not {' and '.join(given)}")
        return data

    @property
    def front(self) -> bool:
        """Whether nothing is fixed: two objectives."""
        return not (self.ratio or self.min_speedup or self.max_bytes or self.max_ppl_increase)

    @property
    def sized(self) -> bool:
        """Whether a size is fixed, so that perplexity and speed are weighed against each other."""
        return bool(self.ratio or self.max_bytes)

    def __str__(self) -> str:
        given = [f"{name} {value:g}" for name, value in self.model_dump().items() if value is not None]
        return given[0].replace("_", "-") if given else "front"


class TextSource(_Frozen):
    """One of several calibration texts; a name alone is one without a share."""

    source: Annotated[str, "file or dataset"]
    """A file or dataset, as for a single text."""
    share: Annotated[float, Field(gt=0, allow_inf_nan=False), "parts"] | None = None
    """Part of the characters that this source has in the calibration text. Only the proportions count."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, data: Any) -> Any:
        return {"source": data} if isinstance(data, str) else data


def _form_of_text(value: Any) -> str:
    return "[sources]" if isinstance(value, (list, tuple)) else "[origin]"


class Text(_Frozen):
    """Text by use: a file or a dataset, or for calibration several of them. [guide.md](guide.md#text) lists the forms of files.

    `FILE` or `FILE:COLUMN` is a file. `NAME:CONFIG:SPLIT:COLUMN` is a dataset, by its name on the Hub or its folder; all but the
    name may be left out or empty. No document serves two uses. A text that is not given is cut from the end of the calibration
    text.
    """

    calibration: (
        Annotated[
            Annotated[str, "file or dataset", Tag("[origin]")]
            | Annotated[tuple[TextSource, ...], Field(min_length=1), Tag("[sources]")],
            Discriminator(_form_of_text),
        ]
        | None
    ) = None
    """Text from which covariances and gradients are collected; `--calibration`. A run needs it. A list mixes several texts: an
    entry is `{source: TEXT, share: PARTS}`. Their documents are interleaved, and a text that has more than its share of the
    characters is cut. Without any `share`, all of each text is taken."""
    validation: Annotated[str, "file or dataset"] | None = None
    """Text on which the search judges plans; null cuts a tenth off the calibration text."""
    report: Annotated[str, "file or dataset"] | None = None
    """Text of the final perplexity, which neither calibration nor search sees; null cuts a tenth off the calibration text."""
    recovery: Annotated[str, "file or dataset"] | None = None
    """Text to recover on, for `factorization.recover_tokens`; a dataset is streamed, however many documents it has. null is all of
    the calibration text.
    """

    @model_validator(mode="after")
    def _all_shares_or_none(self) -> Text:
        if isinstance(self.calibration, tuple) and len({entry.share is None for entry in self.calibration}) > 1:
            raise ValueError("calibration: give every source a share, or none")
        return self

    @property
    def sources(self) -> str | list[tuple[str, float | None]] | None:
        """The calibration text: one origin, or several with their shares."""
        if isinstance(self.calibration, tuple):
            return [(entry.source, entry.share) for entry in self.calibration]
        return self.calibration


class Calibration(_Frozen):
    """How the covariances of the layers' inputs are collected. Time grows with `sequences` x `length`."""

    sequences: Annotated[int, Field(ge=1), "sequences"] = 1024
    """Sequences that are drawn from the calibration text."""
    length: Annotated[int, Field(ge=2), "tokens"] = 2048
    """Length of one sequence."""
    pool_sequences: Annotated[int, Field(ge=1), "sequences"] = 32
    """Sequences in one pool. Each pool is centred on its own mean (Bolaco, arXiv 2405.10616, section 3)."""
    batch_tokens: Annotated[int, Field(ge=1), "tokens"] = 4096
    """Size of one forward pass of a block. More needs more memory."""


class Factorization(_Frozen):
    """How the layers are compressed once the search has chosen the ranks; docs/methods.md says what each step brings."""

    structure: Structure = "narrow"
    """`narrow` removes neurons of the MLPs, which stay dense layers, and splits other layers into two factors where that pays.
    `low_rank` splits every layer into two factors. `identity_block` keeps a higher rank per parameter, and is slower to serve.
    """
    weights: tuple[Precision, ...] | None = None
    """What weights may be rounded to, if the engine can multiply by it here and it pays: `int8` (and `fp8`) round the inputs of a
    layer too, `int4_g32` has 4 bits and one scale for 32 weights (also `_g64`, `_g128`). null is `int8` and `int4_g32`, and `fp8`
    on a GPU. An empty list rounds nothing.
    """
    embedding: Literal["none", "int8", "int4_g32"] | None = None
    """What the embedding and the output layer of an ONNX graph are rounded to; vLLM keeps them as they are. null is `int8` where
    weights may be rounded, and `none` elsewhere.
    """
    residuals: tuple[Annotated[int, Field(ge=1)], ...] = (8, 16, 32)
    """Ranks of the factors that may be added to weights of 4 bits, to make up for their rounding."""
    fisher: tuple[Kind, ...] = KINDS
    """Kinds of layers whose errors are weighted by the gradient of the loss. An empty list saves the backward passes, and costs
    quality.
    """
    fisher_tokens: Annotated[int, Field(ge=64), "tokens"] = 65536
    """Calibration tokens that run through the backward passes."""
    propagate: bool | None = None
    """Compute the factors of the chosen plan again, block by block, for the inputs that the compressed blocks before them give.
    null does this for `low_rank` and `identity_block` plans that remove 30 % or more, without recovery.
    """
    refine: Literal["none", "adam"] | None = None
    """Train each block for `refine_steps` steps of Adam towards the outputs of the dense block. null is `adam`, and `none` before
    a recovery, which trains the same parameters.
    """
    refine_steps: Annotated[int, Field(ge=1), "steps"] = _REFINE_STEPS
    """Steps of Adam for each block."""
    refine_tokens: Annotated[int, Field(ge=64), "tokens"] | None = None
    """Calibration tokens that `propagate` and `refine` see; null is a quarter of them."""
    recover_minutes: Annotated[float, Field(ge=0, allow_inf_nan=False), "minutes"] = 0.0
    """Time to distil the dense model into the compressed one, at the same ranks, size and speed; `--recover`. 0 is none."""
    recover_tokens: Annotated[int, Field(ge=0), "tokens"] = 0
    """The same by tokens of text, in place of minutes; `--recover-tokens`. The learning rate falls with the tokens that are left.
    0 is none.
    """
    recover_batch_tokens: Annotated[int, Field(ge=1), "tokens"] = 2048
    """Tokens of one step of a recovery. A pass of the model takes `calibration.batch_tokens` of them at most."""
    recover_recompute: bool = False
    """Keep only the states between blocks for the backward passes of a recovery, and compute the others again: less memory, more
    time (gradient checkpointing).
    """

    recover_processes: Annotated[int, Field(ge=1), "processes"] | None = None
    """Processes of this machine that recover together, each on its part of the windows of a step; null is one for each GPU, and one
    on a machine without. A launcher's number goes before.
    """
    recover_sharded: bool | None = None
    """Let each of several processes keep a part of both models and of what is trained (FSDP), in place of copies: less memory, more
    communication. null does so on GPUs.
    """

    @property
    def recovers(self) -> bool:
        """Whether there is a recovery."""
        return bool(self.recover_minutes or self.recover_tokens)

    @property
    def refinement(self) -> Literal["none", "adam"]:
        """`refine`, with null resolved."""
        return self.refine or ("none" if self.recovers else "adam")

    @model_validator(mode="after")
    def _one_budget(self) -> Factorization:
        if self.recover_minutes and self.recover_tokens:
            raise ValueError("give recover_minutes or recover_tokens, not both")
        return self

    @model_validator(mode="after")
    def _steps_are_adams(self) -> Factorization:
        if self.refinement != "adam" and "refine_steps" in self.model_fields_set and self.refine_steps != _REFINE_STEPS:
            raise ValueError(
                f"refine_steps counts steps of Adam, and refine is {self.refinement}; leave refine_steps out, or set refine: adam"
            )
        return self


class Search(_Frozen):
    """The Optuna study that chooses a rank for each group of layers; docs/search.md describes it."""

    trials: Annotated[int, Field(ge=3), "trials"] = 24
    """Plans that the study judges."""
    sampler: Literal["gp", "tpe", "random"] = "gp"
    """Sampler of the study: a Gaussian process, a tree-structured Parzen estimator, or random search."""
    speed_weight: Annotated[float, Field(ge=0), "nats per log(speedup)"] = 1.0
    """Weight of speed under a ratio target: with 1, one percent of throughput counts as much as one percent of perplexity."""
    rank_step: Annotated[int, Field(ge=1), "ranks"] | None = None
    """Ranks are multiples of this. null is 16 on a CPU and 64 on a GPU, which suits their kernels."""
    width_step: Annotated[int, Field(ge=1), "neurons"] | None = None
    """Numbers of neurons that an MLP or an expert keeps are multiples of this. null is `rank_step`; where that is null too, 16 on a
    CPU and 256 on a GPU."""
    depth_groups: Annotated[int, Field(ge=1), "runs of layers"] = 3
    """Runs of consecutive layers that share one multiplier for each kind of layer."""
    probe_tokens: Annotated[int, Field(ge=64), "tokens"] = 1024
    """Validation tokens on which the sensitivity of each group is measured."""
    validation_tokens: Annotated[int, Field(ge=64), "tokens"] = 4096
    """Tokens on which a trial is judged: windows that represent the pool."""
    validation_pool: Annotated[int, Field(ge=64), "tokens"] = 16384
    """Validation tokens from which these windows are chosen."""
    validation_length: Annotated[int, Field(ge=16), "tokens"] = 512
    """Length of one window."""
    measured_plans: Annotated[int, Field(ge=1), "plans"] = 3
    """Plans of the front that are exported and measured on the engine, besides the dense model."""
    choose: Annotated[int, Field(ge=0), "trial number"] | None = None
    """Trial to export in place of the best one; `--choose`. report.html lists the trials."""

    def steps(self, *, gpu: bool) -> tuple[int, int]:
        """Return `rank_step` and `width_step`, with null resolved for a GPU or a CPU."""
        ranks, neurons = (64, 256) if gpu else (16, 16)
        return self.rank_step or ranks, self.width_step or self.rank_step or neurons


class Workload(_Frozen):
    """A kind of traffic: requests with unique prompts that arrive together and generate the same number of tokens."""

    prompt_tokens: Annotated[int, Field(ge=1), "tokens"] = 128
    """Length of each prompt."""
    output_tokens: Annotated[int, Field(ge=1), "tokens"] = 128
    """Tokens that each request generates."""
    concurrency: Annotated[int, Field(ge=1), "requests"] = 8
    """Requests at once."""
    share: Annotated[float, Field(gt=0, allow_inf_nan=False), "parts"] = 1.0
    """Part of the machine's time that this traffic has with the dense model. Only the proportions count."""


PROFILES: Final[Mapping[str, Workload]] = {
    "chat": Workload(prompt_tokens=128, output_tokens=128, concurrency=8),
    "prefill": Workload(prompt_tokens=1024, output_tokens=32, concurrency=4),
    "decode": Workload(prompt_tokens=32, output_tokens=256, concurrency=1),
}
"""The default traffic: conversations, long prompts, and long answers to one request at a time."""


def shares(workloads: Mapping[str, Workload]) -> dict[str, float]:
    """Return each workload's share of the dense model's time; they sum to 1."""
    total = sum(workload.share for workload in workloads.values())
    return {name: workload.share / total for name, workload in workloads.items()}


class EngineSettings(_Frozen):
    """The engine that measures plans and serves the artifact."""

    runtime: Literal["vllm", "onnx"] = "vllm"
    """`vllm`, or `onnx` for ONNX Runtime; `--target`."""
    dtype: Dtype = "bfloat16"
    """Number format of the stored weights, of vLLM's arithmetic, and of ONNX Runtime's on CUDA."""
    onnx_profile: Literal["genai", "portable"] = "genai"
    """Padding that the ONNX graph takes: `genai` that on the right only, `portable` any, at some cost in speed; `--onnx-profile`.
    docs/guide.md says which program needs which.
    """
    onnx_provider: Literal["auto", "cpu", "cuda"] = "auto"
    """What ONNX Runtime computes on. `auto` is CUDA where a session of it has CUDA and runs the graph, and the CPU elsewhere."""
    onnx_dtype: Dtype | None = None
    """Number format of the ONNX graph. null is `dtype` on CUDA, and `float32` on the CPU. `float16` on the CPU is slow; it is for
    graphs that a GPU will run.
    """
    enforce_eager: bool = False
    """Run vLLM without torch.compile: it starts sooner and serves more slowly."""
    tensor_parallel_size: Annotated[int, Field(ge=1), "GPUs"] = 1
    """GPUs among which vLLM divides every layer, in the search and in `serve`, `bench`, `generate` and `eval`; without a GPU,
    processes. ONNX Runtime uses one."""
    gpu_memory_share: Annotated[float, Field(gt=0, lt=1), "share"] = 0.9
    """Part of each GPU's memory that all vLLM engines on it take together, weights included (vLLM's `gpu_memory_utilization`).
    The dense model's engine and a plan's get half of it each. Where the dense model does not fit into a half, they run one after
    the other.
    """
    repeats: Annotated[int, Field(ge=1), "rounds"] = 5
    """Counted rounds in which dense model and plans are measured in turns. From five on, the interval of a speedup holds the true
    median with at least 90 %.
    """


class Report(_Frozen):
    """The final evidence: perplexity on unseen text, and agreement between the engines."""

    tokens: Annotated[int, Field(ge=64), "tokens"] = 32768
    """Report tokens of the final perplexity."""
    length: Annotated[int, Field(ge=16), "tokens"] = 1024
    """Length of one window of the final perplexity."""
    prompts: Annotated[int, Field(ge=1), "prompts"] = 4
    """Prompts on which the engines are compared."""
    prompt_tokens: Annotated[int, Field(ge=2), "tokens"] = 64
    """Length of each of these prompts."""
    new_tokens: Annotated[int, Field(ge=1), "tokens"] = 32
    """Tokens that each engine generates for each of these prompts."""

    @property
    def workload(self) -> Workload:
        """The prompts as an engine is given them."""
        return Workload(
            prompt_tokens=self.prompt_tokens, output_tokens=self.new_tokens, concurrency=min(self.prompts, _PROMPTS_AT_ONCE)
        )


class Recipe(_Frozen):
    """Every setting that decides the result of `compress_and_export`, apart from the content of the model and the texts."""

    model: Annotated[str, "model"]
    """Hub id, folder in Hugging Face layout, or GGUF file of the dense model; the first argument of `compress-and-export`."""
    target: Target = Target()
    text: Text = Text()
    calibration: Calibration = Calibration()
    factorization: Factorization = Factorization()
    search: Search = Search()
    workloads: Annotated[dict[str, Workload], Field(min_length=1)] = dict(PROFILES)
    engine: EngineSettings = EngineSettings()
    report: Report = Report()
    export: Annotated[tuple[str, ...], Field(min_length=1)] = ("vllm", "onnx")
    """Renderings to write: `vllm` (a checkpoint, which transformers loads too), `onnx`, or those of other packages; `--export`."""
    memory: Annotated[float | None, Field(gt=0), "GiB"] = None
    """Of this machine that the run may take, its engines included; null: all that the machine or the container has. Where it is
    short, engines run one after the other, weights of a plan and moments of gradients are pages of files, activations and the
    float32 reference of the proof are computed block by block, and engines that serve in 16 bits are proved as they serve only.
    What is exported of a plan does not depend on it.
    """
    seed: Annotated[int, Field(ge=0), "seed"] = 0
    """Seed of the calibration windows, the search and the prompts; `--seed`."""

    @model_validator(mode="after")
    def _recovery_has_a_size(self) -> Recipe:
        if self.text.recovery is not None and not self.factorization.recover_tokens:
            raise ValueError("text.recovery needs factorization.recover_tokens, which says how much of it to read")
        return self

    @property
    def structure(self) -> Structure:
        """What plans are made of."""
        return self.factorization.structure

    @property
    def requests(self) -> dict[str, Workload]:
        """Everything that the engine must have room for: the workloads, and the report's prompts."""
        return {**self.workloads, "(report)": self.report.workload}

    def to_yaml(self) -> str:
        """Render with every default filled in; `Recipe.load` reads it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @classmethod
    def load(cls, path: Path | None, overrides: Mapping[str, Any], flags: Mapping[str, str] | None = None) -> Recipe:
        """Read a YAML recipe (or start from the defaults) and lay the command line's values over it.

        `overrides` maps dotted names (`search.trials`) to values; `None` values are passed over. `flags` maps dotted names to the
        flags of the command line (`--trials`) that gave their values, by which errors call them.

        Raises:
            InputError: an unreadable file, an unknown setting, or a value out of range, named by its flag or its dotted name.
        """
        data: dict[str, Any] = {} if path is None else read_settings(path, "the recipe", "docs/recipe.md shows one")
        given = {name: value for name, value in overrides.items() if value is not None}
        if any(name.startswith("target.") for name in given):
            data.pop("target", None)
        for name, value in given.items():
            *parents, leaf = name.split(".")
            place = data
            for parent in parents:
                if not isinstance(place.setdefault(parent, {}), dict):
                    raise InputError(f"the recipe {path}: {parent} must hold settings by name, not {shown(place[parent])}")
                place = place[parent]
            place[leaf] = value
        if "model" not in data:
            raise InputError("no model: give one on the command line or in the recipe, a Hub id, a folder or a GGUF file")
        try:
            return cls.model_validate(_absolute_paths(data))
        except ValidationError as error:
            used = {name: flag for name, flag in (flags or {}).items() if name in given}
            raise InputError(_explain(error.errors()[0], path, used)) from None


_NEEDED: Final[Mapping[str, str]] = {
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "finite_number": "must be a finite number",
    "literal_error": "must be {expected}",
    "too_short": "must have at least {min_length} entry",
    "missing": "is missing",
}
"""What a setting must be, by the kind of pydantic's error; {names} are those of the error's context."""

_TYPES: Final[Mapping[str, str]] = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "dict": "settings by name",
    "model": "settings by name",
}
"""What a setting must be, by the first word of pydantic's errors about types (`int_parsing`, `int_from_float`, `int_type`)."""


def _explain(error: ErrorDetails, path: Path | None, flags: Mapping[str, str]) -> str:
    """Say in one line what is wrong with a setting: by its flag, else by its dotted name and the recipe that it stands in."""
    parts = [_printable(str(part)) for part in error["loc"] if not str(part).startswith("[")]  # "[key]", forms of one setting
    where = ".".join(parts)[:_NAMED]
    kind, context, got = error["type"], error.get("ctx", {}), f"; got {shown(error['input'])}"
    if kind == "extra_forbidden":
        of_workload = _names(Workload, ".".join(parts[:2]) + ".") if parts[0] == "workloads" else ()
        close = get_close_matches(where, [*_names(Recipe), *of_workload], 1)
        hint = f"did you mean {close[0]}?" if close else "docs/recipe.md lists them"
        return f"there is no setting {where}{_origin(path)}; {hint}"
    used = [flag for name, flag in flags.items() if name == where or where.startswith(f"{name}.") or name.startswith(f"{where}.")]
    label = " and ".join(used) or f"{where or 'the recipe'}{_origin(path)}"
    if kind == "value_error":  # of a validator of ours, about several settings
        return f"{label}: {context['error']}"
    if kind in _NEEDED:
        return f"{label}: {_NEEDED[kind].format(**context)}{got}"
    return f"{label}: must be {_TYPES.get(kind.partition('_')[0], 'text')}{got}"


def _printable(name: str) -> str:
    """Return a name that stays on its line: one of a recipe may hold line breaks."""
    return name if name.isprintable() else repr(name)[1:-1]


def _origin(path: Path | None) -> str:
    return "" if path is None else f" (recipe {path})"


def _names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every setting and of every section."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _names(field.annotation, f"{prefix}{name}.")


def _absolute_paths(data: dict[str, Any]) -> dict[str, Any]:
    """Make paths of things that exist absolute: the recipe is saved, and read again from other folders."""

    def absolute(value: Any) -> Any:
        place = os.path.expanduser(value) if isinstance(value, str) and "\0" not in value else ""
        return os.path.abspath(place) if place and os.path.exists(place) else value

    def text(value: Any) -> Any:
        if isinstance(value, list):
            return [text(entry) for entry in value]
        if isinstance(value, dict) and "source" in value:
            return {**value, "source": text(value["source"])}
        found = on_disk(value) if isinstance(value, str) else None
        return value if found is None else ":".join(filter(None, (os.path.abspath(found[0]), found[1])))

    texts = data.get("text")
    return {
        **data,
        "model": absolute(data["model"]),
        **({"text": {use: text(value) for use, value in texts.items()}} if isinstance(texts, dict) else {}),
    }
