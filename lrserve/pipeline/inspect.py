"""lrserve inspect and lrserve verify: what a model consists of, and whether an artifact is whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lrserve.compression.groups import Group, as_listed, find_groups
from lrserve.compression.lowrank import QUANT_METHOD, GroupSpec, is_permutation, parse_groups, stored_tensors
from lrserve.errors import ArtifactError
from lrserve.inputs.source import Source, open_source
from lrserve.report.card import table
from lrserve.report.sizes import linear_parameters, sizes
from lrserve.storage.store import MANIFEST, read_manifest, verify_files


def _quantization(folder: Path) -> dict[str, Any] | None:
    """Return config.json's quantization_config if it is ours."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    entry = config.get("quantization_config") if isinstance(config, dict) else None
    return entry if isinstance(entry, dict) and entry.get("quant_method") == QUANT_METHOD else None


def inspect(model: str) -> str:
    """Describe a dense model or an artifact as text: one row per group kind, then the sizes in four units.

    Raises:
        LrserveError: neither of the two, or an architecture that lrserve does not know.
    """
    folder = Path(model).expanduser()
    entry = _quantization(folder)
    if entry is None and (folder / MANIFEST).is_file():
        raise ArtifactError(
            f"{folder} holds no checkpoint, only {', '.join(read_manifest(folder)['files'])}; see lrserve/plan.json"
        )
    specs = parse_groups(entry) if entry is not None else {}
    source = Source(name=model, path=folder) if entry is not None else open_source(model)
    skeleton = source.skeleton()
    groups = as_listed(find_groups(skeleton), specs)
    lines = [f"{source.path}: {type(skeleton).__name__}"]
    rows = []
    for kind in dict.fromkeys(group.kind for group in groups):
        members = [group for group in groups if group.kind == kind]
        found = [specs[group.name] for group in members if group.name in specs]
        ranks = [spec.rank for spec in found]
        shown = f"{min(ranks)} to {max(ranks)}" if ranks else "-"
        structures = ", ".join(sorted({spec.structure for spec in found})) or "-"
        parameters = f"{linear_parameters(members, specs) / 1e6:.1f} M"
        first = members[0]
        rows.append([kind, str(len(members)), f"{first.m} x {first.n}", str(len(ranks)), structures, shown, parameters])
    lines.append(table(["group", "layers", "outputs x inputs", "compressed", "structure", "ranks", "parameters"], rows))
    dtype = getattr(skeleton.config, "dtype", None)
    units = sizes(skeleton, specs, dtype.itemsize if dtype is not None else 4)
    rows = [[name.replace("_", " "), f"{u['dense']:,}", f"{u['compressed']:,}", f"{u['ratio']:.3f}"] for name, u in units.items()]
    lines.append(table(["", "dense", "as stored", "ratio"], rows))
    return "\n\n".join(lines)


def verify(out: Path) -> str:
    """Check an artifact and return one line that says what was checked.

    Raises:
        ArtifactError: not an artifact, or damaged; the message names every fault.
    """
    faults = verify_files(out)
    entry = _quantization(out)
    count = 0
    if entry is not None and not faults:
        specs = parse_groups(entry)
        shapes, orders = stored_tensors(sorted(out.glob("*.safetensors")))
        skeleton = Source(name=str(out), path=out).skeleton()
        groups = {group.name: group for group in as_listed(find_groups(skeleton), specs)}
        for name, spec in specs.items():
            if name not in groups:
                faults.append(f"config.json names a group that the architecture does not have: {name}")
            else:
                faults += _group_faults(groups[name], spec, shapes, orders)
                count += 1
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ArtifactError(f"{out} is damaged: {'; '.join(faults[:5])}{more}; copy or export it again")
    files = read_manifest(out)["files"]
    size = sum(file["bytes"] for file in files.values())
    return (
        f"{out}: {len(files)} files, {size / 1e6:.1f} MB, match the manifest; the factors of {count} groups have the right shapes"
    )


def _group_faults(
    group: Group, spec: GroupSpec, shapes: Mapping[str, tuple[int, ...]], orders: Mapping[str, torch.Tensor]
) -> list[str]:
    order = f"{group.name}.A.order"
    if spec.structure == "narrow_out":
        expected = (spec.rank, group.n)
        return [
            f"{member}.weight has shape {found or 'none'}, expected {expected}"
            for member in group.members
            if (found := shapes.get(f"{member}.weight")) != expected
        ]
    wanted: dict[str, tuple[int, ...]] = {}
    if spec.structure != "narrow_in":
        wanted[f"{group.name}.A.weight"] = (spec.rank, group.n - (spec.rank if spec.structure == "identity_block" else 0))
    faults: list[str] = []
    if spec.gathers:
        wanted[order] = (group.n,)
        if order in orders and not is_permutation(orders[order]):
            faults.append(f"{order} is no permutation of the inputs in int32")
    elif order in orders:
        says = "its inputs are ordered" if spec.ordered else spec.structure
        faults.append(f"{order} belongs to an identity block, config.json says {says}")
    for member, m in zip(group.members, group.out_features, strict=True):
        wanted[f"{member}.B.weight"] = (m, spec.rank)
        wanted[f"{member}.B.bias"] = (m,)
    forbidden = [f"{member}.{name}" for member in group.members for name in ("weight", "bias") if f"{member}.{name}" in shapes]
    faults += [f"{name} stands beside the factors that replace it" for name in forbidden]
    return faults + [
        f"{name} has shape {shapes.get(name, 'none')}, expected {shape}"
        for name, shape in wanted.items()
        if shapes.get(name) != shape
    ]
