"""What it would take to compress a model of an architecture that no family describes: read off its modules, without a weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import nn

from lrserve.compression.groups import FAMILIES, KINDS, is_dense
from lrserve.errors import listed, one_line
from lrserve.inputs.source import Source
from lrserve.report.card import table

_TOKENS: Final = 4  # of the forward pass without weights
_SHOWN: Final = 8  # of parameters


def describe_unknown(source: Source) -> dict[str, Any]:
    """Return the linear layers of one decoder layer by the inputs that they share, and what is missing to compress them; JSON.

    Under `groups`, in the order of the forward pass, the `members` of each, its `outputs`, `inputs` and the `kind` that linears of
    these names have in a known family, if any; under `others` the parameters of the decoder layer that are matrices but no linear
    layer's. `alike` is a known family that has all of these groups, and no others.

    Raises:
        InputError: config.json describes no model.
    """
    skeleton = source.skeleton()
    path, layers = _decoder_layers(skeleton)
    layer = layers[0] if len(layers) else nn.Module()
    linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear) and is_dense(module)}
    members, unread = _by_input(skeleton, linears)
    groups = [
        {
            "members": names,
            "outputs": sum(linears[name].out_features for name in names),
            "inputs": linears[names[0]].in_features,
            "kind": _kind(names),
        }
        for names in members
    ]
    inside = {f"{name}.weight" for name in linears}
    return {
        "path": str(source.path),
        "architecture": type(skeleton).__name__,
        "supported": False,
        "decoder": path,
        "layers": len(layers),
        "groups": groups,
        "shared_inputs_unknown": unread,
        "others": {name: list(p.shape) for name, p in layer.named_parameters() if p.ndim > 1 and name not in inside},
        "alike": _alike(path, members),
    }


def in_words(found: Mapping[str, Any]) -> str:
    """Render what `describe_unknown` found."""
    name, layers = found["architecture"], found["decoder"]
    lines = [f"{found['path']}: {name}, which lrserve does not know. It compresses {', '.join(FAMILIES)}."]
    if found["groups"]:
        by = "" if found["shared_inputs_unknown"] else ", by the input that they share"
        lines.append(f"It has {found['layers']} decoder layers at {layers}. The linear layers of the first one{by}:")
        rows = [[", ".join(own["members"]), f"{own['outputs']} x {own['inputs']}", own["kind"] or "-"] for own in found["groups"]]
        lines.append(table(["linear layers", "outputs x inputs", "kind, by these names"], rows))
    if others := [f"{own} {tuple(shape)}" for own, shape in found["others"].items()]:
        lines.append(f"Matrices that are no linear layers, and would stay as they are: {listed(others, ', ', _SHOWN)}.")
    steps = "\n".join(f"- {step}" for step in _steps(found))
    lines.append(f"What it would take (docs/development.md, 'How to add a family'):\n{steps}")
    return "\n\n".join(lines)


def _steps(found: Mapping[str, Any]) -> list[str]:
    name, kinds = found["architecture"], [group["kind"] for group in found["groups"]]
    if not kinds:
        return ["its decoder layers must be made of torch.nn.Linear; there is nothing here that lrserve could compress"]
    steps = []
    if reason := found["shared_inputs_unknown"]:
        steps.append(f"which linear layers read the same input: the forward pass does not run without weights ({reason})")
    if found["alike"]:
        steps.append(f"an entry for {name} in FAMILIES (lrserve/compression/groups.py): it may be that of {found['alike']}")
    else:
        lacking = [kind for kind in KINDS if kind not in kinds]
        open_ones = [", ".join(group["members"]) for group in found["groups"] if group["kind"] is None]
        said = f"; it says which of {'; '.join(open_ones)} is {', '.join(lacking)}, if any" if open_ones and lacking else ""
        steps.append(f"an entry for {name} in FAMILIES (lrserve/compression/groups.py), with layers={found['decoder']!r}{said}")
    return [
        *steps,
        f"a vLLM that serves {name} and multiplies these linear layers as the entry groups them",
        "for ONNX, an entry in FAMILIES of exporters/onnx_families.py; without one, that export is refused",
        "an entry in tests/tiny.py, by which the tests over all families include it",
    ]


def _decoder_layers(skeleton: Any) -> tuple[str, nn.ModuleList]:
    """Return the list of modules with the most parameters, and where it is; an empty one where there is none."""
    lists = [(name, module) for name, module in skeleton.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    return max(lists, key=lambda own: sum(p.numel() for p in own[1].parameters()), default=("", nn.ModuleList()))


def _by_input(skeleton: Any, linears: Mapping[str, nn.Linear]) -> tuple[list[list[str]], str]:
    """Put linears that read the same tensor together; each alone, and why, where a forward pass on the meta device does not run."""
    read: dict[int, list[str]] = {}
    kept: list[torch.Tensor] = []  # so that no two of them have one id

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def take(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            kept.append(inputs[0])
            read.setdefault(id(inputs[0]), []).append(name)

        return take

    reason = ""
    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        # Given no mask most models look at values, which are not there. Some take none of this shape.
        for mask in (torch.zeros(1, 1, _TOKENS, _TOKENS, device="meta"), None):
            read.clear()
            reason = _run(skeleton, mask)
            if linears.keys() == {name for names in read.values() for name in names}:
                return list(read.values()), ""
    finally:
        for handle in handles:
            handle.remove()
    return [[name] for name in linears], reason or "it does not call all of them"


@torch.no_grad()
def _run(skeleton: Any, mask: torch.Tensor | None) -> str:
    """Run a model on the meta device; returns what stopped it."""
    try:
        skeleton(input_ids=torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta"), attention_mask=mask, use_cache=False)
    except Exception as error:  # of whatever kind a model raises whose forward pass looks at values
        return one_line(error)
    return ""


def _kind(members: list[str]) -> str | None:
    """Return the kind of group that has linears of these names in a known family."""
    for family in FAMILIES.values():
        for kind, names in family.groups.items():
            if set(names.members) == set(members):
                return kind
    return None


def _alike(path: str, groups: list[list[str]]) -> str | None:
    found = {frozenset(members) for members in groups}
    for name, family in FAMILIES.items():
        if family.layers == path and {frozenset(names.members) for names in family.groups.values()} == found:
            return name
    return None
