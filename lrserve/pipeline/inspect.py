"""lrserve inspect and lrserve verify: what a model consists of, and whether an artifact is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lrserve.compression.groups import Group, as_listed, family_of, find_groups
from lrserve.compression.spec import QUANT_METHOD, GroupSpec, Tensor, is_permutation, parse_groups, stored_tensors, tensors_of
from lrserve.errors import ArtifactError
from lrserve.inputs.source import Source, model_folder, open_source
from lrserve.plugins.versions import require_sound_torchvision
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
        LrserveError: as `describe`.
    """
    found = describe(model)
    rows = []
    for kind, group in found["groups"].items():
        low, high = group["ranks"] or (None, None)
        shown = "-" if low is None else f"{low} to {high}"
        lists = [", ".join(map(str, group[name])) or "-" for name in ("structures", "weights", "residuals")]
        shape = f"{group['outputs']} x {group['inputs']}"
        parameters = f"{group['parameters'] / 1e6:.1f} M"
        rows.append([kind, str(group["layers"]), shape, str(group["compressed"]), lists[0], shown, *lists[1:], parameters])
    header = ["group", "layers", "outputs x inputs", "compressed", "structure", "ranks", "weights", "residuals", "parameters"]
    units = found["sizes"].items()
    sized = [[name.replace("_", " "), f"{u['dense']:,}", f"{u['compressed']:,}", f"{u['ratio']:.3f}"] for name, u in units]
    return "\n\n".join(
        [
            f"{found['path']}: {found['architecture']}",
            table(header, rows),
            table(["", "dense", "as stored", "ratio"], sized),
        ]
    )


def describe(model: str) -> dict[str, Any]:
    """Return what a dense model or an artifact consists of; JSON.

    Under `groups`, for each kind, the number of its layers, how many are compressed, their structures, lowest and highest rank,
    precisions, ranks of residuals, and parameters as stored; under `sizes`, the four units of `sizes.sizes`.

    Raises:
        LrserveError: neither of the two, or an architecture that lrserve does not know.
    """
    folder = Path(os.path.expanduser(model))
    if (folder / MANIFEST).is_file() and not (folder / "config.json").is_file():
        raise ArtifactError(
            f"{folder} holds no checkpoint, only {', '.join(read_manifest(folder)['files'])}; see lrserve/plan.json"
        )
    require_sound_torchvision()
    folder = model_folder(model)
    entry = _quantization(folder)
    specs = parse_groups(entry) if entry is not None else {}
    source = Source(name=model, path=folder) if entry is not None else open_source(model, accept=family_of)
    skeleton = source.skeleton()
    groups = as_listed(find_groups(skeleton), specs)
    kinds = {}
    for kind in dict.fromkeys(group.kind for group in groups):
        members = [group for group in groups if group.kind == kind]
        found = [specs[group.name] for group in members if group.name in specs]
        ranks = [spec.rank for spec in found if spec.rank]
        kinds[kind] = {
            "layers": len(members),
            "outputs": members[0].m,
            "inputs": members[0].n,
            "compressed": len(found),
            "structures": sorted({spec.structure for spec in found}),
            "ranks": [min(ranks), max(ranks)] if ranks else None,
            "weights": sorted({spec.weights for spec in found if spec.weights}),
            "residuals": sorted({spec.residual for spec in found if spec.residual}),
            "parameters": linear_parameters(members, specs),
        }
    dtype = getattr(skeleton.config, "dtype", None)
    return {
        "path": str(folder),
        "architecture": type(skeleton).__name__,
        "groups": kinds,
        "sizes": sizes(skeleton, specs, dtype.itemsize if dtype is not None else 4),
    }


def verify(out: Path) -> str:
    """Check an artifact and return one line that says what was checked.

    Raises:
        ArtifactError: not an artifact, or damaged; the message names the first faults.
    """
    found = check(out)
    if faults := found["faults"]:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ArtifactError(f"{out} is damaged: {'; '.join(faults[:5])}{more}; copy or export it again")
    return (
        f"{out}: {found['files']} files, {found['bytes'] / 1e6:.1f} MB, match the manifest; "
        f"the tensors of {found['groups']} groups have the right shapes and dtypes"
    )


def check(out: Path) -> dict[str, Any]:
    """Hold an artifact's files against its manifest, and its tensors against its config; JSON.

    Returns:
        The number of `files` and their `bytes` by the manifest, the number of compressed `groups` whose tensors were compared, and
        a line for each of the `faults`.

    Raises:
        ArtifactError: not an artifact, or one whose config.json is not of this format.
    """
    files = read_manifest(out)["files"]
    faults = verify_files(out)
    entry = _quantization(out)
    count = 0
    if entry is not None and not faults:
        require_sound_torchvision()
        specs = parse_groups(entry)
        stored, orders = stored_tensors(sorted(out.glob("*.safetensors")))
        skeleton = Source(name=str(out), path=out).skeleton()
        groups = {group.name: group for group in as_listed(find_groups(skeleton), specs)}
        for name, spec in specs.items():
            if name not in groups:
                faults.append(f"config.json names a group that the architecture does not have: {name}")
            else:
                faults += _group_faults(groups[name], spec, stored, orders, getattr(skeleton.config, "dtype", None))
                count += 1
    return {
        "path": str(out),
        "files": len(files),
        "bytes": sum(file["bytes"] for file in files.values()),
        "groups": count,
        "faults": faults,
    }


def _group_faults(
    group: Group, spec: GroupSpec, stored: Mapping[str, Tensor], orders: Mapping[str, torch.Tensor], dtype: torch.dtype | None
) -> list[str]:
    order = f"{group.name}.A.order"
    faults: list[str] = []
    if spec.gathers:
        if order in orders and not is_permutation(orders[order]):
            faults.append(f"{order} is no permutation of the inputs in int32")
    elif order in orders:
        says = "its inputs are ordered" if spec.ordered else spec.structure
        faults.append(f"{order} belongs to an identity block, config.json says {says}")
    wanted = tensors_of(group, spec)
    allowed = {order, *wanted}
    if spec.structure in ("dense", "narrow_out"):
        allowed |= {f"{member}.bias" for member in group.members}
    owners = tuple(f"{name}." for name in (group.name, *group.members))
    beside = [name for name in stored if name.startswith(owners) and name not in allowed]
    faults += [f"{name} stands beside the tensors that replace it" for name in beside]
    for name, (shape, own) in wanted.items():
        found = stored.get(name)
        if found is None or found.shape != shape:
            faults.append(f"{name} has shape {found.shape if found else 'none'}, expected {shape}")
        elif (own or dtype) not in (None, found.dtype):
            faults.append(f"{name} is {found.dtype}, expected {own or dtype}")
    return faults
