"""Speed of compressed against dense in stock vLLM, and how far both are from what the machine can do.

    python bench/speed.py                                    SmolLM2 and two shapes of 1.1B and 1.2B, every structure
    python bench/speed.py --model 1b --structure narrow --ratio 0.2
    python bench/speed.py --model 1b --structure narrow --dense qkv --dense o       attention stays dense
    python bench/speed.py --model smollm2 --plan demo/lrserve/plan.json

A decode step reads every weight once and multiplies it once for each request. With few requests the reading takes longer, with many
the multiplications, as in the prefill of a prompt. Compression saves both in proportion to the weights that it removes; it saves
nothing of attention, of the other operations of a step, or of the cost of starting an operation.

For each structure one dense engine and one for each ratio are up at once and measured in turns: decode steps with 1, 8 and 32
requests at once, and the prefill of one prompt. All run on vLLM as stock `vllm serve` starts it. Weights are random: the clock does
not see values. Ranks are uniform, except with `--plan`.

    time      milliseconds of one decode step, (time of 65 output tokens - time of 1) / 64, or of the prefill; median of the rounds
    speedup   the dense model's time over this one, round by round: median (lowest to highest)
    limit     the largest speedup that the bound allows
    bound     the longer of two times: to read the weights of the linears and the output layer once (memory), and to multiply by
              them (arithmetic; in a prefill also causal attention, and the output layer for one token only). The rates are those of
              one large layer with the engine's kernel in the same process and round. The percentage is this bound over the measured
              time, median of the rounds
    matmuls   share of the measured time that single layers of these sizes take (lrserve/engines/vllm_latency.py)

With `--quantized` the plans are in int8 (8-bit weights and activations), what they leave dense too. Beside them are dense models:
in bfloat16, and in int8 and int4 by stock vLLM (compressed-tensors checkpoints; int4 in groups of 32).
The rates of int8 and int4 arithmetic are not measured, so these have a bound by reading only, at one request.

Finished measurements are kept in the work folder; a new commit measures again. Run it with nothing else on the machine. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers import __version__ as transformers_version

from lrserve.allocation.losses import uniform
from lrserve.allocation.plan import BudgetFit, Offers, Plan, byte_cost
from lrserve.allocation.speed import Shape, shapes_of
from lrserve.compression.groups import KINDS, STRUCTURES, Group, allocated, find_groups
from lrserve.compression.level import DENSE, Precision
from lrserve.compression.spec import compressed_tensors_config, quantization_config, specs_of
from lrserve.engines.vllm import Engine
from lrserve.engines.workloads import in_turns
from lrserve.pipeline.measure import timing_conditions
from lrserve.plugins.versions import engine_version
from lrserve.report.card import speedup_cell, table
from lrserve.report.console import progress_bar
from lrserve.storage.store import fingerprint, write_json
from publishing import add_results_option, command_line, commit, publish

RATIOS = (0.2, 0.4, 0.6)
CONCURRENCIES = (1, 8, 32)
PROMPT, STEPS = 16, 64  # of a decode measurement
PREFILL = 512  # tokens of one prompt
SAMPLES = 3  # of one request, of the prefill and of the rates, in each round
RATE_SECONDS = 1.0  # over which a rate is the mean
LARGE = Shape(8192, 8192, None)  # whose rates are the bounds
PREFILL_LOAD = f"prefill of {PREFILL}"
LOADS = (*(f"{number} request{'s' * (number > 1)}" for number in CONCURRENCIES), PREFILL_LOAD)
STEP = 64
STOCK: tuple[Precision, ...] = ("int8", "int4_g32")

MODELS: Mapping[str, Mapping[str, Any]] = {
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}
"""SmolLM2-135M, TinyLlama-1.1B, Llama-3.2-1B, Qwen2.5-0.5B and Llama-3.1-8B."""


@dataclass(frozen=True)
class Timed:
    """One round of one engine: seconds of a decode step by number of requests, seconds of the prefill, and the large layer's rates.

    The rates are bytes read and operations, both a second.
    """

    decode: dict[int, float]
    prefill: float
    rates: tuple[float, float]


def decode(engine: Engine, concurrency: int, seed: int) -> float:
    """Seconds of one decode step."""
    short, long = (engine.throughput(PROMPT, tokens, concurrency, seed=seed).seconds for tokens in (1, 1 + STEPS))
    return (long - short) / STEPS


def warm_up(engine: Engine) -> None:
    """Let the first calls of every size pass."""
    for concurrency in CONCURRENCIES:
        engine.throughput(PROMPT, 4, concurrency, seed=0)
    engine.throughput(PREFILL, 1, 1, seed=0)


def rates(microseconds: Sequence[float]) -> tuple[float, float]:
    """Bytes and operations a second of the large layer, by its times for one token and for the prefill's."""
    weights = LARGE.n * LARGE.m
    read, multiplied = microseconds
    return 2 * weights / (1e-6 * read), 2 * weights * PREFILL / (1e-6 * multiplied)


def measure(engine: Engine, seed: int) -> Timed:
    """Measure one round: several requests once; one request, the prefill and between them the rates several times, for the median.

    The machine's bandwidth drifts within seconds, so the rates are those of the same seconds.
    """
    steps = {concurrency: decode(engine, concurrency, seed) for concurrency in CONCURRENCIES[1:]}
    runs = []
    for i in range(SAMPLES):
        step = decode(engine, 1, seed + i)
        (large,) = engine.latency_table([LARGE], [1, PREFILL], seconds=RATE_SECONDS)
        runs.append([step, engine.throughput(PREFILL, 1, 1, seed=seed + i).seconds, *large])
    step, prefill, *large = map(statistics.median, zip(*runs, strict=True))
    return Timed({1: step, **steps}, prefill, rates(large))


@dataclass(frozen=True)
class Contender:
    """What one engine serves: a plan for a model of this config and these groups; or a precision, by vLLM without lrserve."""

    config: LlamaConfig
    groups: Sequence[Group]
    plan: Plan
    stock: Precision | None = None

    @property
    def units(self) -> list[Group]:
        """What the plan allocates."""
        return allocated(self.groups, self.plan.structure)

    @property
    def output_layer(self) -> Shape:
        """The output layer, which no plan touches."""
        return Shape(self.config.hidden_size, self.config.vocab_size, None)

    def write(self, folder: Path) -> Path:
        """Write what vLLM needs to make up the weights."""
        folder.mkdir(parents=True, exist_ok=True)
        config = copy.deepcopy(self.config)
        if self.stock is not None:
            config.quantization_config = compressed_tensors_config(self.stock, ["Linear"], ["lm_head"])
        elif specs := specs_of(self.plan.changed(self.units), self.plan.structure):
            config.quantization_config = quantization_config(specs)
        config.save_pretrained(folder)
        return folder

    def calls(self) -> Counter[Shape]:
        """Count the single layers that one pass through the model calls, the output layer included."""
        offers = Offers(1, self.plan.structure)
        linears = (shape for unit in self.units for shape in shapes_of(unit, self.plan.levels[unit.name], offers))
        return Counter([self.output_layer, *linears])

    @property
    def linear_parameters(self) -> int:
        """Parameters of the decoder's linears."""
        return self.plan.parameters(self.units)

    @property
    def read_bytes(self) -> float:
        """Bytes of weights that a decode step reads: linears with their scales, and the output layer in bfloat16."""
        cost = byte_cost(self.plan.structure, 2)
        return sum(cost(unit, self.plan.levels[unit.name]) for unit in self.units) + 2 * self.output_layer.n * self.output_layer.m

    def operations(self, load: str) -> int:
        """Operations of one of `LOADS`; attention's two multiplications by the positions up to each token in a prefill only."""
        config, output_layer = self.config, self.output_layer.n * self.output_layer.m
        if load != PREFILL_LOAD:
            return 2 * int(load.split()[0]) * (self.linear_parameters + output_layer)
        positions = PREFILL * (PREFILL + 1) // 2
        attention = 2 * 2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers * positions
        return 2 * self.linear_parameters * PREFILL + attention + 2 * output_layer

    def bound(self, load: str, rates: Sequence[float]) -> tuple[float, str] | None:
        """Least seconds for one of `LOADS` at these rates, and what bounds them; None where the rate is not known."""
        memory = self.read_bytes / rates[0], "memory"
        if not any(level.weights for level in self.plan.levels.values()):
            return max(memory, (self.operations(load) / rates[1], "arithmetic"))
        return memory if load == LOADS[0] else None


def model_config(name: str) -> LlamaConfig:
    """Return the config of one of `MODELS`."""
    config = LlamaConfig(**MODELS[name], max_position_embeddings=2048, architectures=["LlamaForCausalLM"])
    config.dtype = "bfloat16"
    return config


def run(name: str, contenders: Mapping[str, Contender], work: Path, rounds: int, eager: bool) -> Any:
    """Measure the contenders, one of which is `dense`, in turns, or read what an earlier run measured."""
    keys = {label: [contender.plan.key(), contender.stock] for label, contender in contenders.items()}
    identity = [name, keys, rounds, eager, engine_version(), transformers_version, timing_conditions(), commit()]
    path = work / f"{name}-{fingerprint(identity)[:16]}.json"
    if not path.is_file():
        with progress_bar(rounds * len(contenders), name) as progress, ExitStack() as stack:
            engines = {}
            for label, contender in contenders.items():
                engine = Engine(
                    contender.write(work / name / label.replace("/", "-")),
                    max_model_len=1024,
                    max_num_seqs=max(CONCURRENCIES),
                    enforce_eager=eager,
                    load_format="dummy",
                    kv_cache_gib=0.5,
                )
                engines[label] = stack.enter_context(engine)
            for engine in engines.values():
                warm_up(engine)
            done = count(1)
            found = in_turns(engines, measure, rounds, seed=1, progress=lambda *_: progress(next(done)))
            calls = {label: contender.calls() for label, contender in contenders.items()}
            shapes = list(dict.fromkeys(shape for of_plan in calls.values() for shape in of_plan))
            tokens = [*CONCURRENCIES, PREFILL]
            table_rows = engines["dense"].latency_table(shapes, tokens)
            rows = {shape: row for shape, row in zip(shapes, table_rows, strict=True) if row is not None}
        last = contenders["dense"].output_layer  # which multiplies one row of a prompt, its last
        prompt = {shape: row[0] if shape == last else row[-1] for shape, row in rows.items()}
        columns = [*({shape: row[i] for shape, row in rows.items()} for i in range(len(CONCURRENCIES))), prompt]
        matmuls = {
            label: {
                load: 1e-6 * sum(number * column[shape] for shape, number in of_plan.items())
                for load, column in zip(LOADS, columns, strict=True)
            }
            for label, of_plan in calls.items()
            if rows.keys() >= of_plan.keys()
        }
        result = {"rounds": {label: [asdict(timed) for timed in timeds] for label, timeds in found.items()}, "matmuls": matmuls}
        write_json(path, result)
    return json.loads(path.read_text(encoding="utf-8"))


def rows_of(contenders: Mapping[str, Contender], result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each contender and each of `LOADS`; times in seconds."""
    rates = [statistics.median(values) for values in zip(*all_rates(result), strict=True)]
    rows = []
    for label, contender in contenders.items():
        rounds, dense = result["rounds"][label], result["rounds"]["dense"]
        for load in LOADS:
            own, other = ([seconds_of(timed, load) for timed in side] for side in (rounds, dense))
            ratios = [reference / seconds for seconds, reference in zip(own, other, strict=True)]
            row: dict[str, Any] = {"plan": label, "bytes": contender.read_bytes, "load": load, "seconds": statistics.median(own)}
            if label != "dense":
                row |= {"speedup": statistics.median(ratios), "speedup_lowest": min(ratios), "speedup_highest": max(ratios)}
            least, dense_least = contender.bound(load, rates), contenders["dense"].bound(load, rates)
            if least and dense_least:
                bounds = (contender.bound(load, timed["rates"]) for timed in rounds)
                shares = [bound[0] / seconds for bound, seconds in zip(bounds, own, strict=True) if bound]
                row |= {"bound": least[1], "share_of_bound": statistics.median(shares), "limit": dense_least[0] / least[0]}
            if label in result["matmuls"]:
                row["matmuls"] = result["matmuls"][label][load] / row["seconds"]
            rows.append(row)
    return rows


def seconds_of(timed: Mapping[str, Any], load: str) -> float:
    """Return what one round took for one of `LOADS`."""
    return float(timed["prefill"] if load == PREFILL_LOAD else timed["decode"][load.split()[0]])


def all_rates(result: Mapping[str, Any]) -> list[Sequence[float]]:
    """List the large layer's rates in every round of every engine."""
    return [timed["rates"] for rounds in result["rounds"].values() for timed in rounds]


def render(name: str, rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any], eager: bool) -> str:
    """Format the rows, under a line that says what they are of and above one that says what the bound is."""

    def line(row: Mapping[str, Any]) -> list[str]:
        first = row["load"] == LOADS[0]
        milliseconds = 1e3 * row["seconds"]
        return [
            row["plan"] if first else "",
            f"{row['bytes'] / 1e6:.0f}" if first else "",
            row["load"],
            f"{milliseconds:.{1 if milliseconds < 200 else 0}f}",
            speedup_cell(row) if "speedup" in row else "",
            f"{row['limit']:.2f}x" if "speedup" in row and "limit" in row else "",
            f"{row['bound']} {row['share_of_bound']:.0%}" if "bound" in row else "",
            f"{row['matmuls']:.0%}" if "matmuls" in row else "",
        ]

    header = ["plan", "MB read", "load", "time, ms", "speedup", "limit", "bound", "matmuls"]
    (lowest, slowest), (highest, fastest) = (tuple(map(pick, zip(*all_rates(result), strict=True))) for pick in (min, max))
    rounds = len(result["rounds"]["dense"])
    mode = f"{'eager' if eager else 'compiled'}, {rounds} round{'s' * (rounds > 1)} in turns"
    return (
        f"{name}, stock {engine_version()}, {mode}\n\n"
        f"{table(header, list(map(line, rows)))}\n\n"
        "Bound: time to read the weights once (memory) or to multiply by them (arithmetic), the longer of the two, over the "
        f"measured time. Rates of one {LARGE.n} x {LARGE.m} layer in the same rounds: {lowest / 1e9:.0f} to {highest / 1e9:.0f} "
        f"GB/s, {slowest / 1e9:.0f} to {fastest / 1e9:.0f} GFLOP/s. Limit: the speedup if both models ran at their bounds.\n"
    )


def _rounded(plan: Plan, precision: Precision) -> Plan:
    """Return a plan with all weights rounded."""
    return Plan({name: replace(level, weights=precision) for name, level in plan.levels.items()}, plan.structure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS, help="repeatable [default: all]")
    parser.add_argument("--structure", action="append", choices=STRUCTURES, help="repeatable [default: all]")
    parser.add_argument("--ratio", action="append", type=float, help="repeatable [default: 0.2, 0.4 and 0.6]")
    parser.add_argument(
        "--dense", action="append", choices=KINDS, default=[], help="kind that stays dense (narrow: an MLP is a down)"
    )
    parser.add_argument("--plan", action="append", type=Path, help="measure this plan.json instead of uniform ones; repeatable")
    parser.add_argument(
        "--quantized", action="store_true", help="plans in int8, beside dense in bfloat16, and int8 and int4 by stock vLLM"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--work", type=Path, default=Path("speed.work"), help="folder for what is finished [default: speed.work]")
    add_results_option(parser)
    arguments = parser.parse_args()
    if arguments.dense and arguments.plan:
        parser.error("--dense is for uniform plans; a plan.json already says what stays dense")
    results, tables = {}, []
    for name in arguments.model or MODELS:
        with torch.device("meta"):
            groups = find_groups(AutoModelForCausalLM.from_config(model_config(name)))
        contender = partial(Contender, model_config(name), groups)
        nothing = Plan(dict.fromkeys((group.name for group in groups), DENSE), "low_rank")
        dense = {"dense": contender(nothing)}
        series: list[dict[str, Contender]] = []
        if arguments.plan:
            series.append(dense | {path.with_suffix("").as_posix(): contender(Plan.read(path)) for path in arguments.plan})
        else:
            for structure in arguments.structure or STRUCTURES:
                units = allocated(groups, structure)
                fit = BudgetFit([unit for unit in units if unit.kind not in arguments.dense], Offers(STEP, structure))
                total = sum(unit.dense_parameters for unit in units)
                spent = total - fit.dense_cost
                plans = {}
                for ratio in arguments.ratio or RATIOS:
                    ranks = uniform(fit, (1 - ratio) * total - spent).ranks
                    plans[ratio] = Plan.of_ranks({unit.name: ranks.get(unit.name) for unit in units}, structure)
                others = {f"{structure} {ratio:g}": contender(plan) for ratio, plan in plans.items()}
                if arguments.quantized:
                    others = {f"dense {precision}": contender(_rounded(nothing, precision), precision) for precision in STOCK}
                    others |= {f"{structure} {ratio:g} int8": contender(_rounded(plan, "int8")) for ratio, plan in plans.items()}
                series.append(dense | others)
        for contenders in series:
            result = run(name, contenders, arguments.work, arguments.rounds, arguments.eager)
            rows = rows_of(contenders, result)
            results[", ".join([name, *contenders])] = {"rows": rows, **result}
            tables.append(render(name, rows, result, arguments.eager))
            print(tables[-1], flush=True)
    if arguments.results:
        publish(arguments.results, command_line(), "\n".join(tables), results)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
