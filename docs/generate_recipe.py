"""Write docs/recipe.md, the page of every setting, from the classes of lrserve/recipe.py.

    python docs/generate_recipe.py

tests/test_docs.py fails when the page differs from what this script writes.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lrserve.recipe import Recipe

PAGE: Final = Path(__file__).parent / "recipe.md"

_HEAD: Final = """\
# Recipe settings

A recipe is a YAML file. It may hold any of the settings below; a setting that it leaves out has its default. Options of
the command line win over the recipe. `OUT/lrserve/recipe.yaml` holds every setting of a finished run.

```yaml
model: MODEL
text: {calibration: TEXT}
target: {min_speedup: 1.2}
search: {trials: 12}
workloads:
  chat: {prompt_tokens: 512, output_tokens: 256, concurrency: 16}
```

```sh
lrserve compress-and-export --recipe RECIPE -o OUT
```

[guide.md](guide.md) says which settings to change, and when. `python docs/generate_recipe.py` writes this page from
`lrserve/recipe.py`.
"""

_TYPES: Final = {int: "integer", float: "number", str: "text", bool: "true or false"}


def _parts(annotation: Any, metadata: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield the alternatives of a type, each with the metadata of its `Annotated`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *own = get_args(annotation)
        yield from _parts(inner, (*metadata, *own))
    elif origin in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _parts(part, metadata)
    else:
        yield annotation, metadata


def _bounds(metadata: tuple[Any, ...]) -> list[str]:
    """Return the limits among the metadata in words."""
    words = []
    for entry in metadata:
        for limit in entry.metadata if isinstance(entry, FieldInfo) else [entry]:
            match limit:
                case Ge(ge=value):
                    words.append(f"at least {value}")
                case Gt(gt=value):
                    words.append(f"above {value}")
                case Lt(lt=value):
                    words.append(f"below {value}")
                case MinLen(min_length=value):
                    words.append(f"at least {value}")
    return words


def _unit_and_values(name: str, field: FieldInfo) -> tuple[str, str]:
    """Return the unit of a setting, empty for a choice, and what it may be.

    Raises:
        TypeError: a number or a text without a unit.
    """
    unit, values = "", []
    for annotation, metadata in _parts(field.annotation, tuple(field.metadata)):
        if annotation is type(None):
            values.append("null")
        elif get_origin(annotation) is Literal:
            values.append(", ".join(f"`{choice}`" for choice in get_args(annotation)))
        elif get_origin(annotation) is tuple:
            values.append(", ".join([f"list of {_entries(get_args(annotation)[0])}", *_bounds(metadata)]))
        else:
            values.append(", ".join([_TYPES[annotation], *_bounds(metadata)]))
            unit = next((entry for entry in metadata if isinstance(entry, str)), "")
            if not unit and annotation is not bool:
                raise TypeError(f"{name} has no unit; add a string to its Annotated type in lrserve/recipe.py")
    return unit, " or ".join(values)


def _entries(annotation: Any) -> str:
    """Say what the entries of a list are."""
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"`{{{', '.join(annotation.model_fields)}}}`"
    return "names"


def _default(value: Any, required: bool) -> str:
    """Return a default as YAML."""
    if required:
        return "required"
    text = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True)
    return f"`{text.splitlines()[0]}`"


def _table(model: type[BaseModel], prefix: str) -> list[str]:
    """Return the settings of one class as a Markdown table.

    Raises:
        TypeError: a setting without a docstring or a unit.
    """
    rows = ["| setting | default | unit | values | effect |", "|---|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if _nested(field):
            continue
        if not field.description:
            raise TypeError(f"{model.__name__}.{name} has no docstring; say its effect in lrserve/recipe.py")
        effect = " ".join(field.description.split())
        default = _default(field.default, field.is_required())
        unit, values = _unit_and_values(f"{model.__name__}.{name}", field)
        rows.append(f"| `{prefix}{name}` | {default} | {unit} | {values} | {effect} |")
    return rows


def _nested(field: FieldInfo) -> type[BaseModel] | None:
    """Return the class of a setting that holds settings; of a mapping of them, its values' class."""
    annotation = field.annotation
    if get_origin(annotation) is dict:
        annotation = get_args(annotation)[1]
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _paragraphs(docstring: str | None) -> list[str]:
    """Return a docstring as paragraphs, each on one line."""
    return [" ".join(part.split()) for part in (docstring or "").split("\n\n")]


def page() -> str:
    """Return the text of docs/recipe.md."""
    lines = [_HEAD, "## Top level", "", *_table(Recipe, "")]
    for name, field in Recipe.model_fields.items():
        model = _nested(field)
        if model is None:
            continue
        mapping = get_origin(field.annotation) is dict
        lines += ["", f"## {name}", "", "\n\n".join(_paragraphs(model.__doc__)), ""]
        if mapping:
            lines += ["A recipe that names workloads has these and no others. The default:", "", "```yaml", f"{name}:"]
            for key, value in field.default.items():
                lines.append(f"  {key}: " + yaml.safe_dump(value.model_dump(), default_flow_style=True, sort_keys=False).strip())
            lines += ["```", "", "Each workload has a name and these settings:", ""]
        lines += _table(model, "" if mapping else f"{name}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
