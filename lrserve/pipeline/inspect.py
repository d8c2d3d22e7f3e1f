"""lrserve inspect and lrserve verify: what a model consists of, and whether an artifact is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lrserve.allocation.plan import Plan
from lrserve.compression.groups import Mixture, allocated, as_listed, family_of, find_units
from lrserve.compression.spec import QUANT_METHOD, GroupSpec, parse_groups, specs_of
from lrserve.errors import ArtifactError, InputError, UnsupportedModelError, listed
from lrserve.inputs.source import Source, model_folder, open_source
from lrserve.pipeline.unknown import describe_unknown, in_words
from lrserve.plugins.checkpoint import AGAIN, CONFIG, open_checkpoint
from lrserve.plugins.versions import require_sound_torchvision
from lrserve.report.card import table
from lrserve.report.sizes import experts, image_parameters, linear_parameters, sizes
from lrserve.storage.json_files import read_object
from lrserve.storage.store import MANIFEST, check_files, read_manifest, verify_files

_PLAN: Final = "lrserve/plan.json"
_CODE: Final = (".py", ".pkl", ".pt", ".pth", ".bin", ".ckpt")
"""Endings of Python files and pickles."""


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

    Of an architecture that lrserve does not know: what it would take.

    Raises:
        LrserveError: as `describe`.
    """
    found = describe(model)
    if not found["supported"]:
        return in_words(found)
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
    parts = [f"{found['path']}: {found['architecture']}", table(header, rows)]
    if own := found["experts"]:
        counts, widths = (f"{low}" if low == high else f"{low} to {high}" for low, high in (own["kept"], own["neurons"]))
        parts.append(
            f"mixtures of experts in {own['layers']} layers, of {own['experts']} experts with {own['active']} for a token: they "
            f"keep {counts} of {widths} neurons, {own['parameters'] / 1e6:.1f} M parameters"
        )
    if beside := found["image_parameters"]:
        parts.append(f"beside the LLM, to read images: {beside / 1e6:.1f} M parameters, which stay dense")
    return "\n\n".join([*parts, table(["", "dense", "as stored", "ratio"], sized)])


def describe(model: str) -> dict[str, Any]:
    """Return what a dense model or an artifact consists of; JSON.

    Under `groups`, for each kind, the number of its layers, how many are compressed, their structures, lowest and highest rank,
    precisions, ranks of residuals, and parameters as stored; under `experts` and `image_parameters` what the functions of these
    names in `sizes` count; under `sizes`, the four units of `sizes.sizes`. Where `supported` is false, the architecture is not one
    of lrserve's, and the rest is what `unknown.describe_unknown` returns.

    Raises:
        LrserveError: neither of the two.
    """
    folder = Path(os.path.expanduser(model))
    if (folder / MANIFEST).is_file() and not (folder / "config.json").is_file():
        raise ArtifactError(
            f"{folder} holds no checkpoint, only {', '.join(read_manifest(folder)['files'])}; see lrserve/plan.json"
        )
    require_sound_torchvision()
    folder = model_folder(model)
    entry = _quantization(folder)
    if entry is not None:
        check_files(folder)
    specs = parse_groups(entry) if entry is not None else {}
    source = Source(name=model, path=folder)
    if entry is None:
        try:
            family_of(source.config())
        except UnsupportedModelError:
            return describe_unknown(source)
        source = open_source(model, accept=family_of)
    skeleton = source.skeleton()
    groups = as_listed(find_units(skeleton), specs)
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
        "supported": True,
        "groups": kinds,
        "experts": experts(skeleton, specs),
        "image_parameters": image_parameters(skeleton),
        "sizes": sizes(skeleton, specs, dtype.itemsize if dtype is not None else 4),
    }


def verify(out: Path) -> str:
    """Check an artifact and return one line that says what was checked.

    Raises:
        ArtifactError: not an artifact, or not what its manifest says; the message names the first faults.
    """
    found = check(out)
    if faults := found["faults"]:
        raise ArtifactError(f"{out} is damaged: {listed(faults)}; copy or export it again")
    return (
        f"{out}: {found['files']} files, {found['bytes'] / 1e6:.1f} MB, match the manifest; "
        f"the tensors of the model and of its {found['groups']} compressed groups have the right shapes and dtypes"
    )


def check(out: Path) -> dict[str, Any]:
    """Hold an artifact's files against its manifest, its tensors against its config, and that against its plan; JSON.

    Only when all files are those of the manifest are they opened.

    Returns:
        The number of `files` and their `bytes` by the manifest, the number of compressed `groups`, and a line for each of the
        `faults`.

    Raises:
        ArtifactError: not an artifact, or one whose config.json, plan or weights cannot be read.
    """
    files = read_manifest(out)["files"]
    faults = verify_files(out)
    specs: dict[str, GroupSpec] = {}
    if not faults:
        faults = [f"{name} may run code when it is loaded" for name in files if "/" not in name and name.endswith(_CODE)]
    if not faults and (CONFIG in files or any(Path(name).parent == Path() and name.endswith(".safetensors") for name in files)):
        require_sound_torchvision()
        specs, faults = open_checkpoint(out)
        faults += _code_faults(out)
        if not faults and _PLAN in files:
            faults = _plan_faults(out, specs)
    return {
        "path": str(out),
        "files": len(files),
        "bytes": sum(file["bytes"] for file in files.values()),
        "groups": len(specs),
        "faults": faults,
    }


def _code_faults(out: Path) -> list[str]:
    """Name the configs of a checkpoint that make a loader run code beside the weights."""
    configs = [path for path in (out / CONFIG, out / "tokenizer_config.json") if path.exists()]
    configs += sorted(out.glob("*processor_config.json"))
    return [
        f"{path.name} has an auto_map, which names code to run"
        for path in configs
        if "auto_map" in read_object(path, AGAIN, ArtifactError)
    ]


def _plan_faults(out: Path, specs: Mapping[str, GroupSpec]) -> list[str]:
    """Hold the groups that config.json lists against those that the plan compresses."""
    try:
        plan = Plan.read(out / _PLAN)
    except InputError as error:
        raise ArtifactError(f"{error}; copy or export the artifact again") from error
    found = allocated(find_units(Source(name=str(out), path=out).skeleton()), plan.structure)
    # plans of older versions do not list the experts, which stayed dense
    units = {unit.name: unit for unit in found if unit.name in plan.levels or not isinstance(unit, Mixture)}
    if units.keys() != plan.levels.keys():
        strange = sorted(units.keys() ^ plan.levels.keys())
        return [f"{_PLAN} is of another model: {listed(strange)}"]
    wanted = specs_of(plan.changed(list(units.values())), plan.structure)
    return [f"{name} is not in {CONFIG} what {_PLAN} says" for name in {**wanted, **specs} if wanted.get(name) != specs.get(name)]
