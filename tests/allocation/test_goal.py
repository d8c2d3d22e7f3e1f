"""Objectives, constraints, the front, what is measured next, and the choice."""

from __future__ import annotations

import math

import pytest
from allocation.searching import GROUPS, goal

from lrserve.allocation.goal import Evaluated, MeasuredSpeed, choose, knee, next_candidate, pareto_front, rule, why_not
from lrserve.allocation.plan import Plan
from lrserve.errors import InfeasibleTargetError
from lrserve.recipe import Target


def evaluated(perplexity: float, speed: float, *, complete: bool = True) -> Evaluated:
    plan = Plan.of_ranks({group.name: None for group in GROUPS} | {"id": int(100 * perplexity)})
    return Evaluated(plan, perplexity, speed, f"plan {perplexity:g}", 0, complete=complete)


A, B, C, D = evaluated(10.5, 1.02), evaluated(11, 1.2), evaluated(12, 1.1), evaluated(15, 2.0)
TRIALS = [D, C, B, A]
SPEEDS = {e.plan.key(): e.tokens_per_second for e in TRIALS}


def speedup(plan: Plan) -> float:
    return SPEEDS[plan.key()]


def test_the_front_is_of_trials_that_were_judged_whole() -> None:
    assert pareto_front(TRIALS, speedup) == [A, B, D]
    stopped = evaluated(10.1, 3.0, complete=False)
    assert pareto_front([*TRIALS, stopped], lambda plan: SPEEDS.get(plan.key(), 3.0)) == [A, B, D]


def order(target: Target, dense: float = 10.0) -> list[Evaluated]:
    measured: list[Evaluated] = []
    while (found := next_candidate(TRIALS, measured, goal(target, dense), speedup)) is not None:
        measured.append(found)
    return measured


def test_what_is_measured_first() -> None:
    assert order(Target(ratio=0.2)) == [D, B, A]  # log(1.5) - log(2) is the least
    assert order(Target(min_speedup=1.1)) == [B, D]  # A is predicted to fall short, and others are not
    assert order(Target(min_speedup=1.9)) == [D]
    assert order(Target(max_ppl_increase=0.15)) == [B, A]
    assert order(Target())[0] is B
    assert set(map(id, order(Target()))) == {id(A), id(B), id(D)}
    with pytest.raises(InfeasibleTargetError, match=r"the best of the search has 10\.50"):
        order(Target(max_ppl_increase=0.1), dense=5.0)


def test_where_every_prediction_falls_short_the_fastest_is_measured() -> None:
    assert next_candidate(TRIALS, [], goal(Target(min_speedup=3.0)), speedup) is D


def test_what_was_measured_corrects_what_comes_next() -> None:
    slower = {key: 1 + (value - 1) / 10 for key, value in SPEEDS.items()}
    assert next_candidate(TRIALS, [B], goal(Target(min_speedup=1.05)), lambda plan: slower[plan.key()]) is D


def found(trial: Evaluated, measured: float, at_least: float | None = None) -> MeasuredSpeed:
    return MeasuredSpeed(trial, measured, measured - 0.05 if at_least is None else at_least)


def test_the_choice() -> None:
    measured = [found(A, 0.9), found(B, 1.1), found(D, 1.8)]
    assert choose(measured, goal(Target(min_speedup=1.05))) is B
    assert choose(measured, goal(Target(max_ppl_increase=0.9))) is D
    assert choose(measured, goal(Target(ratio=0.2))) is D  # 50 % more perplexity, but 80 % faster
    assert choose(measured[:2], goal(Target(ratio=0.2))) is B
    assert choose(measured, goal(Target())) is D
    with pytest.raises(InfeasibleTargetError, match=r"no measured plan reaches 1\.3x"):
        choose(measured[:2], goal(Target(min_speedup=1.3)))


@pytest.mark.parametrize(
    ("target", "others", "reasons"),
    [
        (
            Target(min_speedup=1.15),
            [(A, 1.1), (D, 1.8)],
            ["misses the target: 1.100x measured, 1.15x asked for", "15.00, the chosen plan 11.00"],
        ),
        (
            Target(max_ppl_increase=0.9),
            [(A, 1.04), (C, 1.1)],
            ["cannot be told from dense: 0.990x", "is slower: 1.100x, the chosen plan 1.200x"],
        ),
        (
            Target(ratio=0.2),
            [(A, 0.9), (D, 1.3)],
            ["is +0.154 (+0.049 nats at 0.900x), that of the chosen plan -0.087 (+0.095 nats at 1.200x)", "is +0.143 (+0.405 nats"],
        ),
        (
            Target(),
            [(A, 1.06), (C, 1.1)],
            ["0.049 nats at 1.060x, the chosen plan 0.095 nats at 1.200x", "0.182 nats at 1.100x"],
        ),
    ],
)
def test_every_other_plan_is_refused_for_a_reason(
    target: Target, others: list[tuple[Evaluated, float]], reasons: list[str]
) -> None:
    """The reasons follow the rule: the plan that they are given against is the one that `choose` takes."""
    best = found(B, 1.2)
    rest = [found(trial, speedup) for trial, speedup in others]
    assert choose([*rest, best], goal(target)) is B
    for plan, reason in zip(rest, reasons, strict=True):
        assert reason in why_not(plan, best, goal(target))
    assert rule(goal(target))


def test_a_plan_that_is_as_good_was_measured_later() -> None:
    measured = [found(B, 1.2), found(B, 1.3)]
    assert choose(measured, goal(Target(min_speedup=1.1))) is B
    assert "measured later" in why_not(measured[1], measured[0], goal(Target(min_speedup=1.1)))


@pytest.mark.parametrize("target", [Target(), Target(max_ppl_increase=0.9), Target(min_speedup=1.05)])
def test_nothing_is_called_faster_within_the_spread(target: Target) -> None:
    with pytest.raises(InfeasibleTargetError, match=r"faster than dense beyond the spread .* at 1\.10x, at least 0\.99x"):
        choose([found(B, 1.1, at_least=0.99)], goal(target))


def test_a_refusal_speaks_of_the_plans_that_are_fast_enough() -> None:
    measured = [found(A, 1.03, at_least=1.01), found(B, 1.1, at_least=0.99)]
    with pytest.raises(InfeasibleTargetError, match=r"no plan that reaches 1\.05x is faster .* 1\.01x; .* at least 0\.99x"):
        choose(measured, goal(Target(min_speedup=1.05)))


def test_a_speedup_below_one_may_be_asked_for() -> None:
    assert choose([found(A, 0.9)], goal(Target(min_speedup=0.8))) is A


def test_the_knee_is_furthest_below_the_chord() -> None:
    assert knee({0: (0.1, 0.05), 1: (0.5, 0.1), 2: (1.0, 1.0)}) == 1
    assert knee({3: (0.0, 0.0)}) == 3
    assert knee({0: (0.5, 0.5), 1: (1.0, 1.0)}) == 1  # of equal ones the faster


def test_objectives_and_constraints() -> None:
    assert goal(Target(ratio=0.2)).objective(20.0, 2.0) == pytest.approx(0.0)
    assert goal(Target(min_speedup=1.2)).objective(20.0, 2.0) == pytest.approx(math.log(2))
    limit = goal(Target(max_ppl_increase=0.1))
    assert limit.objective(20.0, 2.0) == pytest.approx(-math.log(2))
    assert limit.feasible(10.99, 1.0)
    assert not limit.feasible(11.01, 1.0)
    assert not goal(Target(min_speedup=1.2)).feasible(10.0, 1.19)
    assert list(goal(Target()).metrics.values()) == ["minimize", "maximize"]
    assert goal(Target()).loss(math.inf) == math.inf
