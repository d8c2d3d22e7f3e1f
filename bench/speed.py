"""What factors do to speed: dense against ratios 0.2, 0.4 and 0.6 in vLLM, and where the time goes.

    python bench/speed.py                                    SmolLM2 and two shapes of 1.1B and 1.2B, every structure
    python bench/speed.py --model 1b --structure narrow --ratio 0.2
    python bench/speed.py --model 1b --structure narrow --dense qkv --dense o       all that is saved comes from the MLPs
    python bench/speed.py --model smollm2 --plan demo/lrserve/plan.json

Weights are random: the clock does not see values. Plans are uniform, but for `--plan`. For each structure one dense engine and one
for each ratio are up at once and measured in turns: decode steps with 1, 8 and 32 requests at once, and the prefill of one prompt.
All run on vLLM as stock `vllm serve` starts it.

    step      milliseconds of one decode step: (time of 65 output tokens - time of 1) / 64; median of the rounds
    speedup   the dense step over this one, round by round: median (lowest to highest)
    bound     share of what the machine can do: for decode the time in which the model's weights can be read, for prefill the time
              of its multiplications (linears, causal attention, and the output layer for one token), at the rate that the engine's
              kernel reaches on one large matrix in the same process and the same round, over the measured time; median. The rate is
              a mean over a second, as a step is a mean over seconds: both have what others on the machine take away. In brackets
              the share of what the matrix reaches undisturbed, in the lower quartile of its times, which the machine cannot hold
    GEMM      share of that time that its matrix products take, by the table of single layers (`lrserve/engines/vllm_latency.py`)

With `--quantized` the plans are served in int8 (W8A8, `--quantization-config` of `vllm serve`), beside the dense model in bfloat16,
in int8 by lrserve's layers (`dense int8`) and by vLLM alone (compressed-tensors' format), and in int4 by vLLM alone (GPTQ's format,
groups of 32, activations in bfloat16).

What is finished is kept in the work folder. Run it with nothing else on the machine. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers import __version__ as transformers_version

from lrserve.allocation.losses import uniform
from lrserve.allocation.plan import BudgetFit, RankPlan
from lrserve.allocation.speed import Shape, shapes_of
from lrserve.compression.groups import KINDS, STRUCTURES, Group, allocated, find_groups
from lrserve.compression.lowrank import quantization_config, specs_of
from lrserve.engines.vllm import Engine, engine_version, in_turns
from lrserve.pipeline.measure import machine
from lrserve.report.card import table
from lrserve.report.console import progress_bar
from lrserve.storage.store import fingerprint, write_json

RATIOS = (0.2, 0.4, 0.6)
CONCURRENCIES = (1, 8, 32)
PROMPT, STEPS = 16, 64  # of a decode measurement
PREFILL = 512  # tokens of one prompt
SAMPLES = 3  # of one request, of the prefill and of the bounds' rates, in each round
RATE_SECONDS = 1.0  # over which a rate is the mean
LARGE = Shape(8192, 8192, None)  # whose rates are the bounds
STEP = 64

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
}
"""SmolLM2-135M, TinyLlama-1.1B and Llama-3.2-1B."""

BYTES = {"bfloat16": 2.0, "int8": 1.0, "int8 by vLLM": 1.0, "int4": 0.5 + 2 / 32}
"""Of a weight, by precision."""

_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
STOCK_CHECKPOINTS: Mapping[str, Mapping[str, Any]] = {
    "int8 by vLLM": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**_INT8, "strategy": "channel"},
                "input_activations": {**_INT8, "strategy": "token", "dynamic": True},
            }
        },
    },
    "int4": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
}
"""Checkpoints that vLLM serves without lrserve: `quantization_config` by precision."""


@dataclass(frozen=True)
class Timed:
    """One round of one engine: seconds of a decode step by concurrency, of the prefill, and what the large matrix reached.

    That is bytes read and operations a second: `reached` by the mean of its times, `undisturbed` by their lower quartile.
    """

    decode: dict[int, float]
    prefill: float
    reached: tuple[float, float]
    undisturbed: tuple[float, float]


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
    """Bytes and operations a second of the large matrix, by its times for one token and for the prefill's."""
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
    (quiet,) = engine.latency_table([LARGE], [1, PREFILL])
    return Timed({1: step, **steps}, prefill, rates(large), rates(quiet))


@dataclass(frozen=True)
class Contender:
    """What one engine serves: a plan for a model of this config and these groups, in one of `BYTES`' precisions."""

    config: LlamaConfig
    groups: Sequence[Group]
    plan: RankPlan
    precision: str = "bfloat16"

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
        ranks = self.plan.factorized(self.units)
        if self.precision in STOCK_CHECKPOINTS:
            config.quantization_config = STOCK_CHECKPOINTS[self.precision]
        elif ranks or self.precision == "int8":
            config.quantization_config = quantization_config(specs_of(ranks, self.plan.structure))
        config.save_pretrained(folder)
        return folder

    def calls(self) -> Counter[Shape]:
        """Count the single layers of the latency table that one pass through the model takes, the output layer included."""
        linears = (shape for unit in self.units for shape in shapes_of(unit, self.plan.ranks[unit.name], self.plan.structure))
        return Counter([self.output_layer, *linears])

    @property
    def linear_parameters(self) -> int:
        """Parameters of the decoder's linears."""
        return self.plan.parameters(self.units)

    def prefill_flops(self, tokens: int) -> int:
        """Operations that a prompt takes: linears, attention's two products over the positions up to each, one row of logits."""
        config = self.config
        positions = tokens * (tokens + 1) // 2
        attention = 2 * 2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers * positions
        return 2 * self.linear_parameters * tokens + attention + 2 * self.output_layer.n * self.output_layer.m

    @property
    def read_bytes(self) -> float:
        """Bytes of weights that a token reads: linears with the scales of int4's groups, and the output layer in bfloat16."""
        return BYTES[self.precision] * self.linear_parameters + 2 * self.output_layer.n * self.output_layer.m


def model_config(name: str) -> LlamaConfig:
    """Return the config of one of `MODELS`."""
    config = LlamaConfig(**MODELS[name], max_position_embeddings=2048, architectures=["LlamaForCausalLM"])
    config.dtype = "bfloat16"
    return config


def run(name: str, contenders: Mapping[str, Contender], work: Path, rounds: int, eager: bool) -> Any:
    """Measure the contenders, one of which is `dense`, in turns, or read what an earlier run measured."""
    keys = {label: [contender.plan.key(), contender.precision] for label, contender in contenders.items()}
    identity = [name, keys, rounds, eager, engine_version(), transformers_version, machine(), list(Timed.__dataclass_fields__)]
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
                    quantization="int8" if contender.precision == "int8" else None,
                    load_format="dummy",
                    kv_cache_gib=0.5,
                )
                engines[label] = stack.enter_context(engine)
            for engine in engines.values():
                warm_up(engine)
            done = count(1)
            found = in_turns(engines, measure, rounds, seed=1, progress=lambda *_: progress(next(done)))
            calls = {label: contender.calls() for label, contender in contenders.items() if contender.precision == "bfloat16"}
            shapes = list(dict.fromkeys(shape for of_plan in calls.values() for shape in of_plan))
            tokens = [*CONCURRENCIES, PREFILL]
            rows = dict(zip(shapes, engines["dense"].latency_table(shapes, tokens), strict=True))
        last = contenders["dense"].output_layer  # which multiplies one row of a prompt, its last
        prompt = {shape: row[0] if shape == last else row[-1] for shape, row in rows.items()}
        columns = [*({shape: row[i] for shape, row in rows.items()} for i in range(len(CONCURRENCIES))), prompt]
        gemm = {
            label: {
                n: 1e-6 * sum(number * column[shape] for shape, number in of_plan.items())
                for n, column in zip(tokens, columns, strict=True)
            }
            for label, of_plan in calls.items()
        }
        result = {
            "rounds": {label: [asdict(timed) for timed in timeds] for label, timeds in found.items()},
            "gemm_seconds": gemm,
        }
        write_json(path, result)
    return json.loads(path.read_text(encoding="utf-8"))


def speedup(own: Sequence[float], dense: Sequence[float]) -> str:
    """Median and spread of the rounds' ratios."""
    ratios = [reference / seconds for seconds, reference in zip(own, dense, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def render(name: str, contenders: Mapping[str, Contender], result: Mapping[str, Any]) -> str:
    """One line per contender; three columns for each number of requests, and for the prefill."""
    header = ["", "MB read", "matmuls a layer"]
    for concurrency in CONCURRENCIES:
        header += [f"{concurrency}: step, ms", "speedup", "GEMM"] + ["bound"] * (concurrency == 1)
    header += [f"prefill {PREFILL}, ms", "speedup", "GEMM", "bound"]
    lines = []
    for label, contender in contenders.items():
        products = sum(number * (2 if shape.rank is not None else 1) for shape, number in contender.calls().items()) - 1
        cells = [label, f"{contender.read_bytes / 1e6:.0f}", f"{products / contender.config.num_hidden_layers:.1f}"]
        rounds, dense = result["rounds"][label], result["rounds"]["dense"]
        gemm = result["gemm_seconds"].get(label)
        for concurrency in map(str, CONCURRENCIES):
            own, other = ([timed["decode"][concurrency] for timed in side] for side in (rounds, dense))
            cells += times(own, other, gemm and gemm[concurrency])
            if concurrency == "1":
                cells.append(share_of_bound(own, rounds, contender.read_bytes, 0))
        own, other = ([timed["prefill"] for timed in side] for side in (rounds, dense))
        cells += times(own, other, gemm and gemm[str(PREFILL)])
        flops = contender.prefill_flops(PREFILL)
        cells.append(share_of_bound(own, rounds, flops, 1) if gemm else "")
        lines.append(cells)
    every = [timed for rounds in result["rounds"].values() for timed in rounds]
    reached = ", ".join(
        f"{min(values):.0f} to {max(values):.0f} {unit}"
        for values, unit in (
            ([timed["reached"][0] / 1e9 for timed in every], "GB/s read"),
            ([timed["reached"][1] / 1e9 for timed in every], "GFLOP/s"),
        )
    )
    return f"{name}, {engine_version()}; the bounds' rates: {reached}\n\n{table(header, lines)}\n"


def times(own: Sequence[float], dense: Sequence[float], gemm: float | None) -> list[str]:
    """Milliseconds, speedup and the share of matrix products."""
    median = statistics.median(own)
    return [f"{1e3 * median:.{1 if median < 0.2 else 0}f}", speedup(own, dense), f"{gemm / median:.0%}" if gemm else ""]


def share_of_bound(own: Sequence[float], rounds: Sequence[Mapping[str, Any]], amount: float, rate: int) -> str:
    """Median of the rounds' shares of an amount's least time, by one of `rates`, over the measured: reached (undisturbed)."""
    reached, undisturbed = (
        statistics.median(amount / timed[name][rate] / seconds for timed, seconds in zip(rounds, own, strict=True))
        for name in ("reached", "undisturbed")
    )
    return f"{reached:.0%} ({undisturbed:.0%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS, help="repeatable [default: all]")
    parser.add_argument("--structure", action="append", choices=STRUCTURES, help="repeatable [default: all]")
    parser.add_argument("--ratio", action="append", type=float, help="repeatable [default: 0.2, 0.4 and 0.6]")
    parser.add_argument(
        "--dense", action="append", choices=KINDS, default=[], help="kind that stays dense (narrow: an MLP is a down)"
    )
    parser.add_argument("--plan", action="append", type=Path, help="measure this plan.json instead of uniform ones; repeatable")
    parser.add_argument("--quantized", action="store_true", help="in int8, beside dense in bfloat16, int8 and int4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--work", type=Path, default=Path("speed.work"), help="folder for what is finished [default: speed.work]")
    arguments = parser.parse_args()
    if arguments.dense and arguments.plan:
        parser.error("--dense is for uniform plans; a plan.json says itself what stays dense")
    results = {}
    for name in arguments.model or MODELS:
        with torch.device("meta"):
            groups = find_groups(AutoModelForCausalLM.from_config(model_config(name)))
        contender = partial(Contender, model_config(name), groups)
        nothing = RankPlan(dict.fromkeys((group.name for group in groups), None), "low_rank")
        dense = {"dense": contender(nothing)}
        series: list[dict[str, Contender]] = []
        if arguments.plan:
            series.append(dense | {path.with_suffix("").as_posix(): contender(RankPlan.read(path)) for path in arguments.plan})
        else:
            for structure in arguments.structure or STRUCTURES:
                units = allocated(groups, structure)
                fit = BudgetFit([unit for unit in units if unit.kind not in arguments.dense], STEP, structure)
                total = sum(unit.dense_parameters for unit in units)
                spent = total - fit.dense_cost
                plans = {}
                for ratio in arguments.ratio or RATIOS:
                    ranks = uniform(fit, (1 - ratio) * total - spent).ranks
                    plans[ratio] = RankPlan({unit.name: ranks.get(unit.name) for unit in units}, structure)
                if arguments.quantized:
                    others = {"dense int8": contender(nothing, "int8")}
                    others |= {f"dense {precision}": contender(nothing, precision) for precision in STOCK_CHECKPOINTS}
                    others |= {f"{structure} {ratio:g} int8": contender(plan, "int8") for ratio, plan in plans.items()}
                else:
                    others = {f"{structure} {ratio:g}": contender(plan) for ratio, plan in plans.items()}
                series.append(dense | others)
        for contenders in series:
            result = run(name, contenders, arguments.work, arguments.rounds, arguments.eager)
            results[", ".join([name, *contenders])] = result
            print(render(name, contenders, result), flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
