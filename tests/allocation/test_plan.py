"""Budgets are met by construction, for any shares and any cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FACTORED

from lrserve.allocation.losses import RoundingLoss, by_level, estimates, fisher, least_loss, loss_aware, probed, relative, uniform
from lrserve.allocation.plan import BudgetFit, Offers, Plan, byte_cost, rank_choices
from lrserve.compression.groups import Group, Structure, allocated, separate
from lrserve.compression.level import Level
from lrserve.errors import InfeasibleTargetError, InputError


def group(name: str, m: int, n: int) -> Group:
    return Group(name=name, kind="o", layer=0, members=(name,), out_features=(m,), in_features=n)


GROUPS = [group("a", 96, 64), group("b", 64, 64), group("c", 64, 160), group("tiny", 4, 4)]
FITS: dict[Structure, BudgetFit] = {structure: BudgetFit(GROUPS, Offers(8, structure)) for structure in FACTORED}
FIT = FITS["low_rank"]


@settings(max_examples=100, deadline=None)
@given(
    shares=st.lists(st.floats(0.01, 100), min_size=4, max_size=4),
    keep=st.floats(0.4, 1.0),
    structure=st.sampled_from(FACTORED),
)
def test_a_fit_stays_in_the_budget_and_uses_it(shares: list[float], keep: float, structure: Structure) -> None:
    fit = FITS[structure]
    budget = keep * fit.dense_cost
    plan = fit.fit(dict(zip("abc", shares, strict=False)) | {"tiny": shares[3]}, budget)
    spent = plan.parameters(GROUPS)
    assert plan.structure == structure
    assert spent <= budget
    assert abs(plan.ratio(GROUPS) - (1 - spent / fit.dense_cost)) < 1e-12
    for member in GROUPS:  # nothing more fits: each next level would break the budget
        rank = plan.ranks[member.name]
        levels = [*rank_choices(member, 8, structure), None]
        if rank is not None:
            upper = levels[levels.index(rank) + 1]
            assert spent - member.parameters(rank, structure) + member.parameters(upper, structure) > budget
        assert rank in levels


def test_uniform_gives_equal_shares() -> None:
    groups = [group(str(i), 128, 128) for i in range(6)]
    fit = BudgetFit(groups, Offers(1))
    plan = uniform(fit, 0.5 * fit.dense_cost)
    ranks = [rank or 0 for rank in plan.ranks.values()]
    assert max(ranks) - min(ranks) <= 1  # what rounding left over goes to some


def test_an_mlp_that_loses_neurons_is_one_unit() -> None:
    gate_up = Group("mlp.gate_up", "gate_up", 0, ("mlp.gate", "mlp.up"), out_features=(96, 96), in_features=32, biases=192)
    down = Group("mlp.down", "down", 0, ("mlp.down",), out_features=(32,), in_features=96)
    groups = [group("o", 64, 64), gate_up, down]
    assert allocated(groups, "low_rank") == groups
    units = allocated(groups, "narrow")
    assert [unit.name for unit in units] == ["o", "mlp.down"]
    assert sum(unit.dense_parameters for unit in units) == sum(unit.dense_parameters for unit in groups)
    # 40 rows of gate and up with their biases, 40 columns of down, and its new bias
    assert units[1].parameters(40, "narrow_in") == 40 * (2 * 32 + 2) + 40 * 32 + 32
    assert units[1].bias_entries(40, "narrow_in") == 80 + 32
    assert units[1].full_rank == 96
    assert rank_choices(units[1], 16, "narrow") == [16, 32, 48, 64, 80]
    assert rank_choices(units[0], 16, "narrow") == rank_choices(groups[0], 16, "low_rank")
    plan = uniform(BudgetFit(units, Offers(1, "narrow")), 0.5 * sum(unit.dense_parameters for unit in units))
    assert plan.ratio(units) == pytest.approx(0.5, abs=0.01)
    assert plan.key()[0] == ("structure", "narrow")


def test_neurons_may_have_a_step_of_their_own() -> None:
    gate_up = Group("mlp.gate_up", "gate_up", 0, ("mlp.gate", "mlp.up"), out_features=(96, 96), in_features=32)
    mlp = Group("mlp.down", "down", 0, ("mlp.down",), out_features=(32,), in_features=96, fed_by=gate_up)
    offers = Offers(8, "narrow", width_step=32)
    assert [level.rank for level in offers.levels(mlp)] == [32, 64, None]
    assert offers.levels(GROUPS[1]) == Offers(8, "narrow").levels(GROUPS[1])  # two factors
    assert Offers(8, "low_rank", width_step=32).levels(mlp) == Offers(8, "low_rank").levels(mlp)


def test_a_group_too_small_to_save_stays_dense() -> None:
    assert all(rank_choices(GROUPS[3], 8, structure) == [] for structure in FACTORED)
    assert uniform(FIT, 0.5 * FIT.dense_cost).ranks["tiny"] is None


def test_an_impossible_budget_says_so() -> None:
    with pytest.raises(InfeasibleTargetError, match="smallest levels need"):
        FIT.fit({g.name: 1.0 for g in GROUPS}, 0.01 * FIT.dense_cost)


def brute_force(losses: dict[str, list[float]], groups: list[Group], fit: BudgetFit, budget: float) -> float:
    best = float("inf")
    levels = {g.name: [*rank_choices(g, 8, fit.structure), None] for g in groups}

    def visit(rest: list[Group], cost: float, loss: float) -> None:
        nonlocal best
        if cost > budget:
            return
        if not rest:
            best = min(best, loss)
            return
        for rank in levels[rest[0].name]:
            extra = 0.0 if rank is None else losses[rest[0].name][rank]
            visit(rest[1:], cost + rest[0].parameters(rank, fit.structure), loss + extra)

    visit(groups, 0.0, 0.0)
    return best


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), keep=st.floats(0.4, 0.95), structure=st.sampled_from(FACTORED))
def test_the_lagrangian_comes_close_to_the_exhaustive_optimum(seed: int, keep: float, structure: Structure) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = GROUPS[:3]
    fit = BudgetFit(groups, Offers(8, structure))
    errors = {}
    for g in groups:
        values = torch.rand(g.full_rank, generator=generator, dtype=torch.float64).sort(descending=True).values ** 3
        tails = torch.cat([values.flip(0).cumsum(0).flip(0), torch.zeros(1)])
        errors[g.name] = tails / tails[0]
    sensitivities = {g.name: float(torch.rand(1, generator=generator)) + 0.1 for g in groups}
    budget = keep * fit.dense_cost
    weighted = {name: e * sensitivities[name] for name, e in errors.items()}
    plan = least_loss(fit, weighted, budget)
    losses = {name: loss.tolist() for name, loss in weighted.items()}
    loss = sum(0.0 if (r := plan.ranks[g.name]) is None else losses[g.name][r] for g in groups)
    assert plan.parameters(groups) <= budget
    # one group's jump from break-even to dense is the most that a Lagrangian solution can leave on the table
    assert loss <= brute_force(losses, groups, fit, budget) + max(max(rest[8:]) for rest in losses.values())


def test_a_sensitive_group_gets_more() -> None:
    groups = [group("a", 128, 128), group("b", 128, 128)]
    fit = BudgetFit(groups, Offers(8))
    tails = torch.linspace(1, 0, 129, dtype=torch.float64) ** 2
    plan = least_loss(fit, {"a": tails * 10.0, "b": tails * 0.1}, 0.6 * fit.dense_cost)
    assert plan.parameters(groups[:1]) > plan.parameters(groups[1:])


def test_losses_of_the_allocators() -> None:
    errors = {"a": torch.tensor([4.0, 1.0, 0.0]), "b": torch.zeros(3)}
    assert relative(errors)["a"].tolist() == [1.0, 0.25, 0.0]
    assert relative(errors)["b"].tolist() == [0.0, 0.0, 0.0]
    assert fisher(errors)["a"].tolist() == [2.0, 0.5, 0.0]
    mixed = fisher(errors, {"b": torch.tensor([7.0, 1.0, 0.0])})
    assert (mixed["a"].tolist(), mixed["b"].tolist()) == ([2.0, 0.5, 0.0], [7.0, 1.0, 0.0])
    losses = probed(errors, {"a": (1, 0.3), "b": (None, 0.0)})
    assert losses["a"][1] == pytest.approx(0.3)  # through what was measured
    assert losses["a"][0] == pytest.approx(1.2)
    every = estimates(errors, {"a": (1, 0.3), "b": (1, 0.0)}, {"a"})
    assert list(every) == ["loss_aware", "probed", "fisher"]
    assert every["fisher"]["b"].tolist() == every["probed"]["b"].tolist()
    assert list(estimates(errors, {"a": (1, 0.3), "b": (1, 0.0)}, ())) == ["probed"]
    mean = loss_aware(losses, fisher(errors))
    assert mean["a"].tolist() == pytest.approx([(1.2 * 2.0) ** 0.5, (0.3 * 0.5) ** 0.5, 0.0])


def test_identity_blocks_keep_more_rank_for_the_same_parameters() -> None:
    square = group("a", 128, 128)
    assert square.parameters(64, "low_rank") == 128 * 128 + 128  # half rank already costs as much as dense
    assert square.parameters(64, "identity_block") == 64 * (256 - 64) + 128
    assert square.parameters(128, "identity_block") == 128 * 128 + 128
    assert max(rank_choices(square, 8, "identity_block")) == 112
    assert max(rank_choices(square, 8, "low_rank")) == 56


def test_fused_groups_come_apart_with_their_own_biases() -> None:
    members = ("model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.k_proj")
    fused = Group("qkv", "qkv", 3, members, out_features=(8, 4), in_features=6, biases=12)
    (q, from_q), (k, _) = separate([fused])
    assert from_q is fused
    assert (q.kind, q.name, q.members, q.m, q.biases) == ("q", members[0], members[:1], 8, 8)
    assert (k.kind, k.m, k.n, k.biases) == ("k", 4, 6, 4)


def test_plan_files_round_trip_and_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = Plan({"a": Level(8, "int8"), "b": Level(), "c": Level(None, "int4_g32", 16)}, structure="low_rank")
    for own in (plan, replace(plan, embedding="int8")):
        own.write(path)
        assert Plan.read(path) == own
    path.write_text('{"format_version": 2, "structure": "narrow", "ranks": {"a": 8, "b": null}}')
    assert Plan.read(path) == Plan.of_ranks({"a": 8, "b": None}, "narrow")
    head = '{"format_version": %d, "structure": "%s", "ranks": {%s}, "levels": {"a": %s}}'
    wrong = [(1, "low_rank", "", "{}"), (2, "low_rank", '"a": -1', "{}"), (2, "new", "", "{}")]
    levels = ('{"rank": 0.5}', '{"rank": true}', '{"weights": "int2"}', '{"residual": 8}', '{"new": 1}', "[]", "7")
    wrong += [(3, "narrow", "", level) for level in levels]
    embedded = '{"format_version": 3, "structure": "low_rank", "embedding": "int2", "levels": {"a": {}}}'
    for content in ("[]", "nonsense", embedded, *(head % values for values in wrong)):
        path.write_text(content)
        with pytest.raises(InputError, match="not a plan"):
            Plan.read(path)


def test_bytes_and_precision_share_one_budget() -> None:
    groups = [group("a", 128, 128), group("b", 128, 128)]
    offers = Offers(8, "low_rank", ("int8", "int4_g32"), (8,))
    fit = BudgetFit(groups, offers, byte_cost("low_rank", 2))
    dense, int8 = 2 * 128 * 128, 128 * 128 + 4 * 128
    int4 = 128 * 128 // 2 + 2 * 128 * 4
    costs = {level: cost for cost, level in fit.levels("a")}
    assert costs[Level()] == dense
    assert costs[Level(weights="int8")] == int8
    assert costs[Level(weights="int4_g32", residual=8)] == int4 + 8 * 256 + 4 * 8
    assert not any(level.rank and level.weights == "int4_g32" for level in costs)  # factors have 8 bits or all of them
    assert costs[Level(16, "int8")] == 16 * 256 + 4 * (128 + 16) + 2 * 128
    tails = torch.linspace(1, 0, 129, dtype=torch.float64) ** 2
    rounding = {
        name: {"int8": RoundingLoss(0.001 * scale), "int4_g32": RoundingLoss(0.1 * scale, {8: 0.25})}
        for name, scale in (("a", 1.0), ("b", 10.0))
    }
    losses = by_level(groups, {g.name: list(costs) for g in groups}, {"a": tails, "b": tails}, rounding)
    assert losses["b"][Level(weights="int4_g32", residual=8)] == pytest.approx(0.25)
    plan = fit.cheapest_loss(losses, int8 + int4 + 8 * 256 + 4 * 8)
    assert plan.levels == {"a": Level(weights="int4_g32", residual=8), "b": Level(weights="int8")}
    assert plan.byte_share(groups, 2) == fit.cost(plan) / (2 * dense)
    only8 = fit.cheapest_loss(losses, 2 * dense, lambda name, level: level.weights == "int8")
    assert {level.weights for level in only8.levels.values()} == {"int8"}
    assert fit.cheapest_loss(losses, 2 * dense).changed(groups) == []
    assert fit.fit({"a": 1.0, "b": 1.0}, 2 * int8, {"a": "int8", "b": "int8"}).levels == dict.fromkeys("ab", Level(weights="int8"))


def test_of_an_mlp_with_fewer_neurons_only_what_is_left_is_rounded() -> None:
    gate_up = Group("mlp.gate_up", "gate_up", 0, ("mlp.gate", "mlp.up"), out_features=(96, 96), in_features=32)
    down = Group("mlp.down", "down", 0, ("mlp.down",), out_features=(32,), in_features=96)
    [mlp] = allocated([gate_up, down], "narrow")
    levels = Offers(16, "narrow", ("int8", "int4_g32"), (8,)).levels(mlp)
    assert {level.rank for level in levels if level.weights == "int4_g32"} == {32, 64, None}  # whole groups of inputs
    rounding = {mlp.name: {"int8": RoundingLoss(0.3), "int4_g32": RoundingLoss(1.2, {8: 0.5})}}
    losses = by_level([mlp], {mlp.name: levels}, {mlp.name: torch.zeros(97)}, rounding)[mlp.name]
    assert losses[Level(32, "int8")] == pytest.approx(0.1)
    assert losses[Level(32, "int4_g32", 8)] == pytest.approx(0.2)
    assert mlp.stored_bytes(Level(32, "int8"), "narrow_in", 2) == (32 * 32 + 4 * 32) + (64 * 32 + 4 * 64) + 2 * 32
