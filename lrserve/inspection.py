"""lrserve inspect and lrserve verify: what a model consists of, and whether an artifact is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lrserve.allocation.plan import RankPlan
from lrserve.artifacts.card import sizes, table
from lrserve.artifacts.store import MANIFEST, read_manifest, verify_files
from lrserve.compression.groups import KINDS, Group, find_groups
from lrserve.compression.lowrank import QUANT_METHOD, GroupSpec, parse_groups
from lrserve.errors import ArtifactError
from lrserve.inputs.source import Source, open_source


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
    groups = find_groups(skeleton)
    plan = RankPlan({group.name: specs[group.name].rank if group.name in specs else None for group in groups})
    lines = [f"{source.path}: {type(skeleton).__name__}"]
    rows = []
    for kind in KINDS:
        members = [group for group in groups if group.kind == kind]
        ranks = [rank for group in members if (rank := plan.ranks[group.name]) is not None]
        shown = f"{min(ranks)} to {max(ranks)}" if ranks else "-"
        parameters = sum(group.parameters(plan.ranks[group.name]) for group in members)
        first = members[0]
        rows.append([kind, str(len(members)), f"{first.m} x {first.n}", str(len(ranks)), shown, f"{parameters / 1e6:.1f} M"])
    lines.append(table(["group", "layers", "outputs x inputs", "low-rank", "ranks", "parameters"], rows))
    total = sum(parameter.numel() for parameter in skeleton.parameters())
    head = skeleton.get_output_embeddings().weight.numel()
    dtype = getattr(skeleton.config, "dtype", None)
    units = sizes(groups, plan, total, head, dtype.itemsize if dtype is not None else 4)
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
        shapes = _tensor_shapes(out)
        groups = {group.name: group for group in find_groups(Source(name=str(out), path=out).skeleton())}
        for name, spec in specs.items():
            if name not in groups:
                faults.append(f"config.json names a group that the architecture does not have: {name}")
            else:
                faults += _group_faults(groups[name], spec, shapes)
                count += 1
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ArtifactError(f"{out} is damaged: {'; '.join(faults[:5])}{more}; copy or export it again")
    files = read_manifest(out)["files"]
    size = sum(file["bytes"] for file in files.values())
    return (
        f"{out}: {len(files)} files, {size / 1e6:.1f} MB, match the manifest; the factors of {count} groups have the right shapes"
    )


def _tensor_shapes(out: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(out.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            shapes.update((name, tuple(tensors.get_slice(name).get_shape())) for name in tensors.keys())  # noqa: SIM118
    return shapes


def _group_faults(group: Group, spec: GroupSpec, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    wanted: dict[str, tuple[int, ...]] = {f"{group.name}.A.weight": (spec.rank, group.n)}
    for member, m in zip(group.members, group.out_features, strict=True):
        wanted[f"{member}.B.weight"] = (m, spec.rank)
        wanted[f"{member}.B.bias"] = (m,)
    forbidden = [f"{member}.{name}" for member in group.members for name in ("weight", "bias") if f"{member}.{name}" in shapes]
    return [f"{name} stands beside the factors that replace it" for name in forbidden] + [
        f"{name} has shape {shapes.get(name, 'none')}, expected {shape}"
        for name, shape in wanted.items()
        if shapes.get(name) != shape
    ]
