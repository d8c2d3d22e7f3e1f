"""Baseline of bench/quality.py and bench/search.py: level switching (EvoPress, arXiv 2410.14649, section 3), a (1 + lambda) search.

A plan has a level for each group: a place among the costs that the group can have (`BudgetFit.levels` in
lrserve/allocation/plan.py). One generation makes offspring of the parent plan; the best of them becomes the parent if it is better.
An offspring raises one to three random groups, fewer more often, by one to four levels each. It pays for that by lowering random
other groups until the budget holds; what they freed beyond that is given out again, a level at a time. So every plan meets the
budget, and the lowest value never rises.

The paper switches levels between matrices of equal size, or among all of them; groups here differ in size, so it is among all. It
selects in steps, each on more and freshly drawn tokens. Here every offspring is measured once, on the caller's fixed tokens: values
are comparable across generations, and the parent is measured once.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lrserve.allocation.plan import BudgetFit, Plan
from lrserve.errors import InfeasibleTargetError, InputError
from lrserve.storage.store import write_json

_FORMAT_VERSION = 1
_GROUPS_RAISED = 3  # at most, in one offspring
_LEVELS_AT_ONCE = 4  # at most, of one group
_ATTEMPTS = 20  # per offspring, at making one that is new in its generation
_ROUNDING = 1e-12  # relative, of a sum of costs in seconds; of one in parameters it is less than one

_Levels = dict[str, int]


def evolve(
    fit: BudgetFit,
    start: Plan,
    budget: float,
    evaluate: Callable[[Plan], float],
    state: Path,
    *,
    generations: int,
    offspring: int,
    seed: int,
    progress: Callable[[int, float], None] = lambda generation, best: None,
) -> Plan:
    """Improve a plan for a number of generations, or resume doing so, and return the best; it is never worse than the start.

    The state is written after each generation. The random numbers of a generation depend on the seed and its number alone, so an
    interrupted search comes to the same plan, and more generations go on where fewer ended.

    Args:
        fit: the groups, rank step and cost.
        start: the plan to begin with.
        budget: in the fit's cost unit.
        evaluate: what to minimise, such as the divergence from the dense model on fixed tokens; what is not finite counts as worst.
        state: a JSON file, private to these inputs.
        generations: how many in all, those of an earlier call on this state included.
        offspring: plans in each generation; fewer where there are not so many different ones.
        seed: of the mutations.
        progress: called after each generation with its number, 0 for the start, and the lowest value so far.

    Raises:
        InputError: a start of another structure or whose ranks are not among the fit's levels, or a state file of other inputs.
        InfeasibleTargetError: a start beyond the budget.
    """
    space = _Space(fit, budget)
    parent = space.levels_of(start)
    inputs = {"start": start.key(), "budget": budget, "offspring": offspring, "seed": seed}
    resumed = _read(state, inputs)
    if resumed is None:
        done, best = 0, _measured(evaluate, start)
        _write(state, inputs, done, start, best)
    else:
        done, best = resumed["generation"], math.inf if resumed["value"] is None else resumed["value"]
        parent = space.levels_of(Plan.of_ranks(resumed["ranks"], fit.structure))
    progress(done, best)
    while done < generations:
        done += 1
        rng = random.Random(seed * 1_000_003 + done)
        children: list[_Levels] = []
        for _ in range(_ATTEMPTS * offspring):
            child = space.mutated(parent, rng)
            if child != parent and child not in children:
                children.append(child)
            if len(children) == offspring:
                break
        values = [_measured(evaluate, space.plan(child)) for child in children]
        if values and min(values) < best:
            best = min(values)
            parent = children[values.index(best)]
        _write(state, inputs, done, space.plan(parent), best)
        progress(done, best)
    return space.plan(parent)


class _Space:
    """The levels of every group, and the budget that a choice of them must meet."""

    def __init__(self, fit: BudgetFit, budget: float) -> None:
        self._levels = {group.name: fit.unrounded(group.name) for group in fit.groups}
        self._structure = fit.structure
        self._limit = budget * (1 + _ROUNDING)

    def levels_of(self, plan: Plan) -> _Levels:
        """Return a plan's levels; raises as `evolve` says."""
        if plan.structure != self._structure:
            raise InputError(f"the plan to start from is of structure {plan.structure}, this search of {self._structure}")
        chosen = {}
        for name, levels in self._levels.items():
            ranks = [rank for _, rank in levels]
            if name not in plan.ranks or plan.ranks[name] not in ranks:
                raise InputError(f"{name}: rank {plan.ranks.get(name)} is not among those of this search ({ranks[0]} to dense)")
            chosen[name] = ranks.index(plan.ranks[name])
        cost = self._cost(chosen)
        if cost > self._limit:
            raise InfeasibleTargetError(f"the plan to start from costs {cost:g}, more than the budget of {self._limit:g}")
        return chosen

    def plan(self, chosen: _Levels) -> Plan:
        """Return the plan of a choice of levels."""
        return Plan.of_ranks({name: self._levels[name][level][1] for name, level in chosen.items()}, self._structure)

    def _cost(self, chosen: _Levels) -> float:
        return sum(self._levels[name][level][0] for name, level in chosen.items())

    def mutated(self, parent: _Levels, rng: random.Random) -> _Levels:
        """Return an offspring that meets the budget; the parent itself where none could be made of this draw."""
        child = dict(parent)
        raised = set()
        for _ in range(_few(_GROUPS_RAISED, rng)):
            open_ = [name for name in child if child[name] + 1 < len(self._levels[name])]
            if open_:
                name = rng.choice(open_)
                child[name] = min(child[name] + _few(_LEVELS_AT_ONCE, rng), len(self._levels[name]) - 1)
                raised.add(name)
        lowered = set()
        while self._cost(child) > self._limit:
            payers = [name for name in child if name not in raised and child[name] > 0]
            if not payers:
                return parent
            name = rng.choice(payers)
            child[name] = max(child[name] - _few(_LEVELS_AT_ONCE, rng), 0)
            lowered.add(name)
        while True:
            room = self._limit - self._cost(child)
            affordable = [
                name
                for name, level in child.items()
                if name not in lowered
                and level + 1 < len(self._levels[name])
                and self._levels[name][level + 1][0] - self._levels[name][level][0] <= room
            ]
            if not affordable:
                return child
            child[rng.choice(affordable)] += 1


def _few(most: int, rng: random.Random) -> int:
    """Draw 1 to `most`, small numbers more often."""
    return min(rng.randint(1, most), rng.randint(1, most))


def _measured(evaluate: Callable[[Plan], float], plan: Plan) -> float:
    value = evaluate(plan)
    return value if math.isfinite(value) else math.inf


def _read(path: Path, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = state["format_version"] == _FORMAT_VERSION and state["inputs"] == json.loads(json.dumps(inputs))
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise InputError(f"{path} is not the state of this search; remove it to start over")
    return state


def _write(path: Path, inputs: Mapping[str, Any], generation: int, plan: Plan, value: float) -> None:
    data = {
        "format_version": _FORMAT_VERSION,
        "inputs": inputs,
        "generation": generation,
        "value": value if math.isfinite(value) else None,
        "ranks": plan.ranks,
    }
    write_json(path, data)
