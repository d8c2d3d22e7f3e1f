"""Stage 4, the probes: what each unit alone does to the output, from which the allocators know what levels cost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from lrserve.allocation import losses
from lrserve.allocation.plan import BudgetFit, Offers
from lrserve.allocation.quality import Divergence
from lrserve.compression.assemble import MergedLevels
from lrserve.compression.groups import Group
from lrserve.compression.level import SCHEMES, Level, Precision
from lrserve.compression.spectra import SpectrumStore
from lrserve.pipeline.job import Job, first_tokens, tensor_sha256
from lrserve.report.console import progress_bar, reused
from lrserve.storage.store import write_json
from lrserve.storage.work import WorkFolder

_PROBE_SHARE = 0.5  # share of its dense parameters that a unit keeps while it is probed
_STRUCTURE = "structure"


def probed_losses(
    job: Job, merged: MergedLevels, store: SpectrumStore, offers: Offers, folder: WorkFolder
) -> tuple[frozenset[str], dict[str, losses.Losses]]:
    """Return the units that stay dense, since what they do to the output is not finite, and the losses of the others' levels.

    The losses are by the name of the allocator that minimises them.
    """
    probes = probe_units(job, merged, store, offers, folder)
    sick = frozenset(name for name, found in probes.items() if not _is_finite(found))
    offers = replace(offers, dense=offers.dense | sick)
    weighted = {group.name for group in job.units if group.kind in job.recipe.factorization.fisher}
    rounded = {
        name: {
            precision: losses.RoundingLoss(
                found[precision]["divergence"], {int(rank): left for rank, left in found[precision]["left"].items()}
            )
            for precision in offers.precisions
            if precision in found
        }
        for name, found in probes.items()
    }
    levels = {unit.name: offers.levels(unit) for unit in job.units}
    return sick, {
        base: losses.by_level(job.units, levels, of_ranks, rounded)
        for base, of_ranks in losses.estimates(store.errors(), ranks_probed(probes), weighted).items()
    }


def _is_finite(found: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether all that was probed of a unit is finite."""
    return all(math.isfinite(value) for of in found.values() for value in (of["divergence"], *of.get("left", {}).values()))


def ranks_probed(probes: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int | None, float]]:
    """Return what `probe_units` found of each unit's structure: the rank, and the KL divergence in nats."""
    return {name: (found[_STRUCTURE]["rank"], found[_STRUCTURE]["divergence"]) for name, found in probes.items()}


def _probe_windows(job: Job) -> torch.Tensor:
    return first_tokens(job.windows["validation"], job.recipe.search.probe_tokens)


def probe_units(
    job: Job, merged: MergedLevels, store: SpectrumStore, offers: Offers, folder: WorkFolder
) -> dict[str, dict[str, Any]]:
    """Measure what each unit alone does to the output when it keeps half of its parameters, and when it is rounded.

    Returns:
        By unit, under `structure` the `rank` of the first (`Group.error_index`) and the KL divergence in nats; and by precision the
        divergence and, for each rank of a residual, the share of the rounding's error that is `left`.
    """
    windows = _probe_windows(job)
    identity = {
        "spectra": store.folder.name,
        "windows": tensor_sha256(windows),
        "steps": (offers.step, offers.width_step),
        "structure": offers.structure,
        "share": _PROBE_SHARE,
        "residuals": offers.residuals,
        **({"embedding": offers.embedding} if offers.embedding else {}),
        **({"dense": sorted(offers.dense)} if offers.dense else {}),
    }
    stage = folder.stage("probe", identity)
    path = stage / "probes.json"
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    structures = Offers(offers.step, offers.structure, dense=offers.dense, width_step=offers.width_step)
    wanted: dict[str, list[Precision | None]] = {
        unit.name: [None, *(p for p in offers.precisions if Level(weights=p) in offers.levels(unit))] for unit in job.units
    }
    total = sum(map(len, wanted.values()))
    before = sum((weights or _STRUCTURE) in found.get(name, {}) for name, of in wanted.items() for weights in of)
    done = before
    if before < total:
        merged.apply({})
        divergence = Divergence(merged.model, windows)

        def at(unit: Group, level: Level) -> float:
            merged.apply({unit.name: level})
            return divergence(merged.model, unit.layer)

        def probe(unit: Group, weights: Precision | None) -> dict[str, Any]:
            if weights is None:
                level = _half(unit, structures)
                rank = None if level.rank is None else unit.error_index(level)
                return {"rank": rank, "divergence": at(unit, level)}
            try:
                left = merged.left(unit, weights, offers.residuals) if SCHEMES[weights].bits < 8 else {}
                return {"divergence": at(unit, Level(weights=weights)), "left": left}
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # a decomposition does not converge
                return {"divergence": math.nan, "left": {}}

        with progress_bar(total, "4/6 probe") as progress:
            for unit in job.units:
                own = found.setdefault(unit.name, {})
                for weights in wanted[unit.name]:
                    if (weights or _STRUCTURE) in own:
                        continue
                    own[weights or _STRUCTURE] = probe(unit, weights)
                    write_json(path, found)
                    progress(done := done + 1)
    job.say(f"4/6 probe: divergence of {len(job.units)} units one by one at {total} levels{reused(before, total)}")
    return found


def _half(unit: Group, offers: Offers) -> Level:
    """Return the level at which a unit keeps `_PROBE_SHARE` of its parameters."""
    fit = BudgetFit([unit], offers)
    return fit.fit({unit.name: 1.0}, max(_PROBE_SHARE * fit.dense_cost, fit.smallest_cost)).levels[unit.name]
