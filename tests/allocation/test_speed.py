"""The prediction from single layers' latencies, on numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny import FACTORED

from lrserve.allocation.plan import BudgetFit, Offers, Plan
from lrserve.allocation.speed import Shape, SpeedModel, calls, shapes_of, shapes_to_measure, token_counts
from lrserve.compression.groups import Group, Structure, allocated
from lrserve.compression.level import DENSE as WHOLE
from lrserve.compression.level import Level
from lrserve.recipe import Workload

GROUPS = [Group(name=f"{i}", kind="o", layer=i, members=(f"{i}",), out_features=(128,), in_features=128) for i in range(2)]
WORKLOADS = {"only": Workload(prompt_tokens=100, output_tokens=11, concurrency=2)}
SECONDS = {"only": 0.1}
OFFERS = Offers(16, "low_rank")
LATENCIES = {
    Shape(128, 128, None): {2: 100.0, 200: 5000.0},
    Shape(128, 128, 16): {2: 40.0, 200: 1000.0},
    Shape(128, 128, 32): {2: 60.0, 200: 2000.0},
    Shape(128, 128, 48): {2: 50.0, 200: 3000.0},
}
DENSE = Plan.of_ranks({"0": None, "1": None})


def test_prediction_by_hand() -> None:
    speed = SpeedModel(GROUPS, WORKLOADS, SECONDS, LATENCIES, OFFERS)
    assert speed.tokens_per_second(DENSE) == pytest.approx(2 * 11 / 0.1)
    # 10 decode steps and one prefill chunk: one layer saves 10 x 60 us + 4000 us
    assert speed.relative_times(Plan.of_ranks({"0": 16, "1": None}))["only"] == pytest.approx(1 - (10 * 60e-6 + 4000e-6) / 0.1)
    # halfway between 16 and 32, which shares its noise with 48
    assert speed.cost(GROUPS[0], Level(24)) == pytest.approx((10 * (40 + 55) / 2 * 1e-6 + 1500e-6) / 0.1)


def test_a_rounded_output_layer_saves_its_time_in_every_plan() -> None:
    offers, layer = replace(OFFERS, embedding="int8"), (512, 128)
    wanted = shapes_to_measure(GROUPS, offers, layer)
    assert wanted[-2:] == [Shape(128, 512, None), Shape(128, 512, None, weights="int8")]
    times = {**LATENCIES, wanted[-2]: {2: 300.0, 200: 9000.0}, wanted[-1]: {2: 100.0, 200: 5000.0}}
    speed = SpeedModel(GROUPS, WORKLOADS, SECONDS, times, offers, layer)
    saved = 11 * 200e-6 / 0.1  # 10 decode steps, and the last tokens of the prompts: two rows each
    assert speed.relative_times(replace(DENSE, embedding="int8"))["only"] == pytest.approx(1 - saved)
    assert speed.relative_times(DENSE)["only"] == 1
    losses = {group.name: dict.fromkeys(offers.levels(group), 1.0) | {WHOLE: 0.0} for group in GROUPS}
    plan = BudgetFit(GROUPS, offers, speed.cost).cheapest_loss(losses, 1.0)
    assert plan.embedding == "int8"
    # as fast as the output layer alone makes it: nothing else has to go
    asked = 1 / (1 - saved)
    assert speed.budget(asked) == pytest.approx(sum(speed.cost(group, WHOLE) for group in GROUPS))
    measured = speed.corrected([(plan, {"only": 1 - saved})])
    assert measured.relative_times(plan) == pytest.approx(speed.relative_times(plan))


def test_a_mix_takes_each_workloads_share_of_the_time() -> None:
    workloads = WORKLOADS | {"decode": Workload(prompt_tokens=1, output_tokens=101, concurrency=2, share=3.0)}
    # 100 decode steps, and a prefill of two rows
    speed = SpeedModel(GROUPS, workloads, {"only": 0.1, "decode": 0.2}, LATENCIES, OFFERS)
    plan = Plan.of_ranks({"0": 16, "1": 16})
    times = {"only": 1 - 2 * (10 * 60e-6 + 4000e-6) / 0.1, "decode": 1 - 2 * 101 * 60e-6 / 0.2}
    assert speed.relative_times(plan) == pytest.approx(times)
    assert speed.speedups(plan) == pytest.approx({name: 1 / time for name, time in times.items()})
    assert speed.speedup(plan) == pytest.approx(1 / (0.25 * times["only"] + 0.75 * times["decode"]))
    assert speed.dense_tokens_per_second == pytest.approx(0.25 * 22 / 0.1 + 0.75 * 202 / 0.2)
    assert sum(speed.cost(group, Level(16)) - speed.cost(group, WHOLE) for group in GROUPS) == pytest.approx(
        1 / speed.speedup(plan) - 1
    )


def test_what_the_engine_says_corrects_the_predicted_change() -> None:
    speed = SpeedModel(GROUPS, WORKLOADS, SECONDS, LATENCIES, OFFERS)
    one, both = Plan.of_ranks({"0": 16, "1": None}), Plan.of_ranks({"0": 16, "1": 16})
    predicted = 1 - speed.relative_times(one)["only"]
    half = speed.corrected([(one, {"only": 1 - predicted / 2})])
    assert 1 - predicted < half.relative_times(one)["only"] < 1 - predicted / 2  # drawn towards the table
    many = speed.corrected([(one, {"only": 1 - predicted / 2})] * 1000)
    assert many.relative_times(both)["only"] == pytest.approx(1 - predicted, rel=1e-3)
    assert many.speedup(DENSE) == 1.0
    assert many.corrected([]).speedup(both) == pytest.approx(speed.speedup(both))  # from the table, not from a correction
    slower = speed.corrected([(both, {"only": 1.5})] * 100)
    assert slower.speedup(both) == pytest.approx(1.0)  # never the other way round


def test_a_layer_that_reorders_its_inputs_is_another_shape() -> None:
    down = replace(GROUPS[0], name="2", kind="down")
    assert [shape.ordered for shape in shapes_to_measure([GROUPS[0], down], Offers(64, "identity_block"))] == [False, False, True]
    faster = {
        replace(shape, ordered=True): {rows: us / 2 for rows, us in row.items()} for shape, row in LATENCIES.items() if shape.rank
    }
    speed = SpeedModel([*GROUPS, down], WORKLOADS, SECONDS, LATENCIES | faster, OFFERS)
    assert speed.cost(down, WHOLE) == speed.cost(GROUPS[0], WHOLE)
    assert speed.cost(down, Level(24)) == speed.cost(GROUPS[0], Level(24)) / 2


def test_noise_never_makes_more_rank_cheaper() -> None:
    latencies = {**LATENCIES, Shape(128, 128, 48): {2: 1.0, 200: 1.0}}
    speed = SpeedModel(GROUPS, WORKLOADS, SECONDS, latencies, OFFERS)
    assert (
        speed.cost(GROUPS[0], Level(48)) == speed.cost(GROUPS[0], Level(32)) == pytest.approx((10 * 101e-6 / 3 + 1000.5e-6) / 0.1)
    )


def test_a_speed_budget_is_met_by_construction() -> None:
    speed = SpeedModel(GROUPS, WORKLOADS, SECONDS, LATENCIES, OFFERS)
    fit = BudgetFit(GROUPS, OFFERS, speed.cost)
    plan = fit.fit({"0": 1.0, "1": 1.0}, speed.budget(1.05))
    assert speed.speedup(plan) >= 1.05


@pytest.mark.parametrize("structure", FACTORED)
def test_the_table_covers_dense_and_every_rank_once_per_shape(structure: Structure) -> None:
    shapes = shapes_to_measure(GROUPS, Offers(8, structure))
    ranks = [shape.rank for shape in shapes]
    assert ranks == [*range(8, max(rank or 0 for rank in ranks) + 1, 8), None]
    # two factors of a square layer save up to half of its width, an identity block all the way; both pay for a bias
    assert {None, 8, 56 if structure == "low_rank" else 112} <= {shape.rank for shape in shapes}
    assert max(shape.rank or 0 for shape in shapes) == (56 if structure == "low_rank" else 112)
    assert {shape.structure for shape in shapes if shape.rank is not None} == {structure}


def test_of_large_layers_the_table_has_some_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrserve.allocation.speed._FEWEST_RANKS", 2)
    monkeypatch.setattr("lrserve.allocation.speed._TABLE_WEIGHTS", 2 * 128 * 128)
    assert [shape.rank for shape in shapes_to_measure(GROUPS, Offers(8, "low_rank"))] == [8, 40, 56, None]
    monkeypatch.setattr("lrserve.allocation.speed._TABLE_WEIGHTS", 1)
    assert [shape.rank for shape in shapes_to_measure(GROUPS, Offers(8, "low_rank"))] == [8, 40, 56, None]


def test_an_mlp_with_fewer_neurons_is_timed_as_smaller_dense_layers() -> None:
    gate_up = Group("mlp.gate_up", "gate_up", 0, ("mlp.gate", "mlp.up"), out_features=(96, 96), in_features=32)
    down = Group("mlp.down", "down", 0, ("mlp.down",), out_features=(32,), in_features=96)
    [mlp] = allocated([gate_up, down], "narrow")
    assert shapes_of(mlp, WHOLE, Offers(16, "narrow")) == [Shape(96, 32, None), Shape(32, 192, None)]
    assert shapes_of(mlp, Level(48), Offers(16, "narrow")) == [Shape(48, 32, None), Shape(32, 96, None)]
    latencies = {shape: {2: float(shape.n * shape.m), 200: 0.0} for shape in shapes_to_measure([mlp], Offers(16, "narrow"))}
    speed = SpeedModel([mlp], WORKLOADS, SECONDS, latencies, Offers(16, "narrow"))
    assert speed.cost(mlp, WHOLE) == pytest.approx(10e-6 * 3 * 96 * 32 / 0.1)
    assert speed.cost(mlp, Level(40)) == pytest.approx(10e-6 * 3 * 40 * 32 / 0.1)


def test_what_a_prefill_chunk_sees() -> None:
    long = Workload(prompt_tokens=4097, output_tokens=1, concurrency=8)
    assert calls(long) == {8: 0, 4096: 9}
    assert token_counts({"long": long, "short": Workload(prompt_tokens=2, output_tokens=5, concurrency=8)}) == [8, 16, 4096]


ROUNDED = Offers(16, "low_rank", ("int8", "int4_g32"), (8,))


def rounded_latencies(int4: dict[int, float] | None) -> dict[Shape, dict[int, float] | None]:
    """Rounding to 8 bits halves all times; a residual takes 10 us more in each call."""
    int8 = {replace(shape, weights="int8"): {rows: us / 2 for rows, us in row.items()} for shape, row in LATENCIES.items()}
    whole = Shape(128, 128, None, weights="int4_g32")
    repaired = None if int4 is None else {rows: us + 10 for rows, us in int4.items()}
    return {**LATENCIES, **int8, whole: int4, replace(whole, residual=8): repaired}


def test_levels_are_predicted_by_precision_rank_and_residual() -> None:
    latencies = rounded_latencies({2: 20.0, 200: 1000.0})
    assert set(shapes_to_measure(GROUPS, ROUNDED)) == set(latencies)
    speed = SpeedModel(GROUPS, WORKLOADS, SECONDS, latencies, ROUNDED)
    assert speed.cost(GROUPS[0], Level(24, "int8")) == pytest.approx(speed.cost(GROUPS[0], Level(24)) / 2)
    assert speed.cost(GROUPS[0], Level(weights="int4_g32")) == pytest.approx((10 * 20e-6 + 1000e-6) / 0.1)
    assert speed.cost(GROUPS[0], Level(weights="int4_g32", residual=8)) == pytest.approx((10 * 30e-6 + 1010e-6) / 0.1)
    assert speed.without_what_never_pays().offers == ROUNDED
    plan = Plan({"0": Level(weights="int8"), "1": WHOLE})
    assert speed.relative_times(plan)["only"] == pytest.approx(1 - (10 * 50e-6 + 2500e-6) / 0.1)


def test_the_plan_that_rounds_everything_corrects_the_times_of_its_precision() -> None:
    speed = SpeedModel(GROUPS, WORKLOADS, SECONDS, rounded_latencies({2: 20.0, 200: 1000.0}), ROUNDED)
    int8 = Plan(dict.fromkeys("01", Level(weights="int8")), "low_rank")
    predicted = speed.relative_times(int8)["only"]
    corrected = speed.corrected([(int8, {"only": predicted - 0.02})])
    assert corrected.relative_times(int8)["only"] == pytest.approx(predicted - 0.02)
    one = Plan({"0": Level(weights="int8"), "1": WHOLE}, "low_rank")
    assert corrected.relative_times(one)["only"] == pytest.approx(speed.relative_times(one)["only"] - 0.01)
    ranks = Plan.of_ranks({"0": 16, "1": None}, "low_rank")
    assert corrected.relative_times(ranks) == speed.relative_times(ranks)  # of ranks nothing was measured
    both = Plan(dict.fromkeys("01", Level(16, "int8")), "low_rank")
    slower = corrected.relative_times(both)["only"]
    again = speed.corrected([(int8, {"only": predicted - 0.02}), (both, {"only": slower + 0.01})])
    assert slower < again.relative_times(both)["only"] < slower + 0.01
    assert again.relative_times(int8)["only"] == pytest.approx(predicted - 0.02)


def test_a_precision_that_the_engine_cannot_run_or_that_never_pays_is_not_offered() -> None:
    assert SpeedModel(GROUPS, WORKLOADS, SECONDS, rounded_latencies(None), ROUNDED).offers.precisions == ("int8",)
    slower = SpeedModel(GROUPS, WORKLOADS, SECONDS, rounded_latencies({2: 90.0, 200: 4000.0}), ROUNDED)
    assert slower.offers.precisions == ("int8", "int4_g32")  # faster than dense, and not than 8 bits
    assert slower.without_what_never_pays().offers.precisions == ("int8",)
