"""The recipe: every setting of a run in one frozen object, from YAML and the command line, saved with the artifact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lrserve.compression.groups import KINDS, Kind, Structure
from lrserve.errors import InputError

Dtype = Literal["bfloat16", "float16", "float32"]


_REFINE_STEPS: Final = 25
_PROMPTS_AT_ONCE: Final = 32


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Target(_Frozen):
    """What the user fixed; the search optimises the rest. With none of the three it looks for the whole front of both."""

    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the parameters of the decoder's linear layers to remove."""
    min_speedup: Annotated[float, Field(gt=0)] | None = None
    """Output tokens per second of the compressed model over those of the dense one, measured."""
    max_ppl_increase: Annotated[float, Field(gt=0)] | None = None
    """Largest relative increase of the validation perplexity: 0.05 allows 5 percent."""

    @model_validator(mode="before")
    @classmethod
    def _at_most_one(cls, data: Any) -> Any:
        given = [name for name, value in data.items() if value is not None] if isinstance(data, dict) else []
        if len(given) > 1:
            raise ValueError(f"give one of ratio, min_speedup and max_ppl_increase, not {' and '.join(given)}")
        return data

    @property
    def front(self) -> bool:
        """Whether nothing is fixed: two objectives."""
        return not (self.ratio or self.min_speedup or self.max_ppl_increase)

    def __str__(self) -> str:
        given = [f"{name} {value:g}" for name, value in self.model_dump().items() if value is not None]
        return given[0].replace("_", "-") if given else "front"


class Text(_Frozen):
    """Text by use. Each is a file (.jsonl with a "text" field, or plain text) or the name of a Hub dataset.

    Where validation or report are not given, they are cut from the end of the calibration text, so the three never overlap.
    """

    calibration: str | None = None
    validation: str | None = None
    report: str | None = None


class Calibration(_Frozen):
    """How the covariances are collected."""

    sequences: Annotated[int, Field(ge=1)] = 1024
    length: Annotated[int, Field(ge=2)] = 2048
    """Tokens per sequence."""
    pool_sequences: Annotated[int, Field(ge=1)] = 32
    """Sequences in one pool: Bolaco (2405.10616) section 3 averages the covariances of pools centred one by one."""
    batch_tokens: Annotated[int, Field(ge=1)] = 4096
    """Tokens in one forward pass of a block."""


class Factorization(_Frozen):
    """How the factors are made. Ranks are the search's; docs/methods.md says what each idea brings."""

    structure: Structure = "narrow"
    """What becomes of the groups: `narrow` takes neurons out of the MLPs, which stay dense layers, and makes two factors of the
    rest where that pays; `low_rank` makes two factors of all; `identity_block` keeps more rank per parameter, and is slower.
    """
    fisher: tuple[Kind, ...] = KINDS
    """Group kinds whose output errors are weighted by the loss gradient; none switches the backward passes off."""
    fisher_tokens: Annotated[int, Field(ge=64)] = 65536
    """Calibration tokens that go through the backward passes."""
    propagate: bool | None = None
    """Find the chosen plan's factors anew, block by block, for the activations that the compressed blocks before them give.

    None does so for plans that remove 30 % of the linears' parameters or more, where it pays on all text that we measured; but not
    where MLPs lose neurons, where it does not pay, nor before a recovery, which gets further from the factors of the search.
    """
    refine: Literal["none", "adam"] | None = None
    """Refine each block's factors against the dense block's outputs by `refine_steps` of Adam.

    None takes Adam, but nothing before a recovery, which trains the same parameters.
    """
    refine_steps: Annotated[int, Field(ge=1)] = _REFINE_STEPS
    refine_tokens: Annotated[int, Field(ge=64)] | None = None
    """Calibration tokens that `propagate` and `refine` see; None for a quarter of them."""
    recover_minutes: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Time for distilling the dense model into the factors, once the ranks are chosen; 0 switches it off."""

    @property
    def refinement(self) -> Literal["none", "adam"]:
        """What `refine` comes to."""
        return self.refine or ("none" if self.recover_minutes else "adam")

    @model_validator(mode="after")
    def _steps_are_adams(self) -> Factorization:
        if self.refinement != "adam" and "refine_steps" in self.model_fields_set and self.refine_steps != _REFINE_STEPS:
            raise ValueError(f"refine_steps counts steps of Adam; refine is {self.refinement}")
        return self


class Search(_Frozen):
    """The Optuna study."""

    trials: Annotated[int, Field(ge=3)] = 24
    sampler: Literal["gp", "tpe", "random"] = "gp"
    speed_weight: Annotated[float, Field(ge=0)] = 1.0
    """What speed counts under a ratio target: with 1, one percent of throughput is worth one percent of perplexity."""
    rank_step: Annotated[int, Field(ge=1)] = 16
    """Ranks are multiples of this; the factor kernels like multiples of 16 on CPU and 64 on GPU."""
    depth_groups: Annotated[int, Field(ge=1)] = 3
    """Runs of layers that share one multiplier per group kind."""
    probe_tokens: Annotated[int, Field(ge=64)] = 1024
    """Validation tokens on which the sensitivity of each group is measured."""
    validation_tokens: Annotated[int, Field(ge=64)] = 4096
    """Tokens that a trial is judged on: windows chosen from the pool such that their mean loss is close to the pool's."""
    validation_pool: Annotated[int, Field(ge=64)] = 16384
    """Tokens of the pool."""
    validation_length: Annotated[int, Field(ge=16)] = 512
    measured_plans: Annotated[int, Field(ge=1)] = 3
    """Plans of the front that are measured end to end on the engine, besides the dense model."""
    choose: Annotated[int, Field(ge=0)] | None = None
    """Number of the trial to export, instead of the best one."""


class Workload(_Frozen):
    """A kind of traffic: `concurrency` requests at once, each of unique prompts, decoding exactly `output_tokens`."""

    prompt_tokens: Annotated[int, Field(ge=1)] = 128
    output_tokens: Annotated[int, Field(ge=1)] = 128
    concurrency: Annotated[int, Field(ge=1)] = 8
    share: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Part of the machine's time that this traffic takes with the dense model; only the proportions count."""


PROFILES: Final[Mapping[str, Workload]] = {
    "chat": Workload(prompt_tokens=128, output_tokens=128, concurrency=8),
    "prefill": Workload(prompt_tokens=1024, output_tokens=32, concurrency=4),
    "decode": Workload(prompt_tokens=32, output_tokens=256, concurrency=1),
}
"""What a server is asked for: a conversation, mostly reading, mostly writing."""


def shares(workloads: Mapping[str, Workload]) -> dict[str, float]:
    """Return each workload's share of the dense model's time; they sum to 1."""
    total = sum(workload.share for workload in workloads.values())
    return {name: workload.share / total for name, workload in workloads.items()}


class EngineSettings(_Frozen):
    """The engine that measures and serves."""

    runtime: Literal["vllm", "onnx"] = "vllm"
    """`onnx`: ONNX Runtime on the CPU, in float32, with the exported graph; the next two do not concern it."""
    dtype: Dtype = "bfloat16"
    enforce_eager: bool = False
    """Skip torch.compile: starts faster, serves slower."""
    repeats: Annotated[int, Field(ge=1)] = 5
    """Counted rounds of the interleaved measurement, after a warm-up."""


class Report(_Frozen):
    """The final evidence."""

    tokens: Annotated[int, Field(ge=64)] = 32768
    length: Annotated[int, Field(ge=16)] = 1024
    """Tokens per window of the perplexity."""
    prompts: Annotated[int, Field(ge=1)] = 4
    """Prompts on which the renderings are compared."""
    prompt_tokens: Annotated[int, Field(ge=2)] = 64
    new_tokens: Annotated[int, Field(ge=1)] = 32

    @property
    def workload(self) -> Workload:
        """The prompts as an engine is given them."""
        return Workload(
            prompt_tokens=self.prompt_tokens, output_tokens=self.new_tokens, concurrency=min(self.prompts, _PROMPTS_AT_ONCE)
        )


class Recipe(_Frozen):
    """Everything that decides the result of `compress_and_export`, apart from the model's and the texts' content."""

    model: str
    target: Target = Target()
    text: Text = Text()
    calibration: Calibration = Calibration()
    factorization: Factorization = Factorization()
    search: Search = Search()
    workloads: Annotated[dict[str, Workload], Field(min_length=1)] = dict(PROFILES)
    engine: EngineSettings = EngineSettings()
    report: Report = Report()
    export: Annotated[tuple[str, ...], Field(min_length=1)] = ("vllm", "onnx")
    seed: Annotated[int, Field(ge=0)] = 0

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
    def load(cls, path: Path | None, overrides: dict[str, Any]) -> Recipe:
        """Read a YAML recipe (or start from the defaults) and lay the command line's values over it.

        `overrides` maps dotted names (`search.trials`) to values; `None` values are passed over.

        Raises:
            InputError: an unreadable file, an unknown setting, or a value out of range, named by its dotted name.
        """
        data: dict[str, Any] = {}
        if path is not None:
            try:
                loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
            except OSError as error:
                raise InputError(f"cannot read the recipe {path}: {error.strerror}; check the path") from None
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise InputError(f"the recipe {path} is not YAML: {' '.join(str(error).split())}") from None
            if loaded is not None and not isinstance(loaded, dict):
                raise InputError(f"the recipe {path} holds a {type(loaded).__name__}, not settings by name (README, 'Settings')")
            data = loaded or {}
        if any(name.startswith("target.") and value is not None for name, value in overrides.items()):
            data.pop("target", None)
        for name, value in overrides.items():
            if value is None:
                continue
            *parents, leaf = name.split(".")
            place = data
            for parent in parents:
                if not isinstance(place.setdefault(parent, {}), dict):
                    raise InputError(f"the recipe {path}: {parent} must hold settings by name, not {place[parent]!r}")
                place = place[parent]
            place[leaf] = value
        if "model" not in data:
            raise InputError("no model: give one on the command line or in the recipe, a Hub id, a folder or a GGUF file")
        try:
            return cls.model_validate(_absolute_paths(data))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "recipe"
            origin = f" (recipe {path})" if path is not None else ""
            raise InputError(f"{where}{origin}: {first['msg']}; got {first['input']!r}") from None


def _absolute_paths(data: dict[str, Any]) -> dict[str, Any]:
    """Make paths of things that exist absolute: the recipe is saved, and read again from other folders."""

    def absolute(value: Any) -> Any:
        return str(Path(value).expanduser().absolute()) if isinstance(value, str) and Path(value).expanduser().exists() else value

    text = data.get("text")
    return {
        **data,
        "model": absolute(data["model"]),
        **({"text": {use: absolute(value) for use, value in text.items()}} if isinstance(text, dict) else {}),
    }
