"""The model's context: windows, prompts and answers of a recipe must fit into it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

from lrserve.errors import InputError
from lrserve.recipe import Recipe, Workload
from lrserve.report.console import Say

_STATED: Final = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
"""Kinds of RoPE with which max_position_embeddings is the context; vLLM multiplies it by the factor of any other, but for Gemma."""
_SHORTEST: Final = 16  # tokens: of a window, by the recipe
_WINDOWS: Final = (("calibration", "length"), ("search", "validation_length"), ("report", "length"))


def context_length(config: Any, engines: Collection[str]) -> int:
    """Return the longest sequence, in tokens, that all of these engines run; vLLM counts RoPE scaling in, ONNX graphs do not."""
    length = int(config.max_position_embeddings)
    if set(engines) != {"vllm"} or "gemma" in str(config.model_type):
        return length
    rope = getattr(config, "rope_parameters", None) or {}
    factor = None if rope.get("rope_type") in _STATED else rope.get("factor")
    return int(length * (factor or 1.0))


def fitted(recipe: Recipe, context: int, say: Say) -> Recipe:
    """Shorten what the recipe leaves to its defaults until it fits into the context, and say so.

    Raises:
        InputError: a setting that was given, or the context itself, is too long or too short; names the setting.
    """
    if context < _SHORTEST:
        raise InputError(
            f"config.json: the model's context is {context} tokens (max_position_embeddings), and the shortest window {_SHORTEST}"
        )
    changes: dict[str, dict[str, int]] = {}
    for section, name in _WINDOWS:
        part = getattr(recipe, section)
        if getattr(part, name) > context:
            if name in part.model_fields_set:
                raise _too_long(f"{section}.{name} {getattr(part, name)} is", context)
            changes.setdefault(section, {})[name] = context
    if prompts := _shortened(recipe.report, "report", ("prompt_tokens", "new_tokens"), recipe.report.model_fields_set, context):
        changes.setdefault("report", {}).update(prompts)
    for name, workload in recipe.workloads.items():
        given = workload.model_fields_set if "workloads" in recipe.model_fields_set else ()
        if shorter := _shortened(workload, f"workloads.{name}", ("prompt_tokens", "output_tokens"), given, context):
            changes[f"workloads.{name}"] = shorter
    if not changes:
        return recipe
    told = ", ".join(f"{part}.{name} {value}" for part, values in changes.items() for name, value in values.items())
    say(f"the model's context is {context} tokens (max_position_embeddings), so these defaults are shortened: {told}")
    workloads = {
        name: Workload.model_validate({**workload.model_dump(), **changes.get(f"workloads.{name}", {})})
        for name, workload in recipe.workloads.items()
    }
    sections = {
        part: getattr(recipe, part).model_copy(update=changes.get(part, {})) for part in ("calibration", "search", "report")
    }
    return recipe.model_copy(update={**sections, "workloads": workloads})


def _shortened(part: Any, where: str, names: tuple[str, str], given: Collection[str], context: int) -> dict[str, int]:
    """Return shorter lengths of a prompt and its answer, none if they fit; what was given stays."""
    first, second = names
    prompt, answer = getattr(part, first), getattr(part, second)
    if prompt + answer <= context:
        return {}
    given = [name for name in names if name in given]
    if len(given) == 2 or (first in given and prompt >= context) or (second in given and answer > context - 2):
        raise _too_long(f"{where}.{first} {prompt} and {where}.{second} {answer} together are", context)
    if given:
        return {second: context - prompt} if first in given else {first: context - answer}
    prompt = min(max(2, context * prompt // (prompt + answer)), context - 1)
    return {first: prompt, second: context - prompt}


def _too_long(what: str, context: int) -> InputError:
    return InputError(f"{what} more than the model's context of {context} tokens (max_position_embeddings); give less")
