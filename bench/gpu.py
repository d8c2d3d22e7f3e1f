"""Every stage of a run on one GPU: its numbers against the CPU's, its time and its peak of memory, and times of single layers.

    python bench/gpu.py --out gpu.json
    python bench/gpu.py --device cpu --shape tiny --out tiny.json      without a GPU: only that the script works

Needs torch and transformers besides lrserve itself. Weights and tokens are random, so there is nothing to download. It ends within
8 minutes: what there was no time for stands under `left_out`, and what failed under `errors`. The file is written anew after each
part. Run it with nothing else on the machine. The JSON holds, besides `made`, `commit` and `versions`:

    agreement   by dtype and stage, how far the device's numbers are from the CPU's on a small model, as a share of the CPU's. Both
                have the same weights and tokens, and each stage builds on its own earlier ones. In float32 1e-4 and less is what
                other kernels round differently; in bfloat16 a few percent. More is an error of lrserve, or of the device. The
                exception are gradients, whose labels each device draws by itself: up to 30 percent.
    stages      at `--shape`: `seconds`, and `peak_bytes` of the GPU's memory at once, the model included (null on a CPU). Factors
                and rounding are those of the first decoder block only, so a run needs as many times their seconds as there are
                blocks, and the same memory.
    rates       `bytes` and `operations` a second of one large layer, at 1 token and at many.
    layers      single layers in bfloat16 by replays of a CUDA graph (on a CPU by calls): `us`, microseconds, and `bound_us`, the
                longer of two times at these rates: to read the weights once, and to multiply by them; each for every entry of
                `tokens`. `dense` is the layer, `factors` two factors with half of its parameters, `narrow` a layer with half of its
                outputs. Near the bound, us / bound_us is 1; far above it the layer is too small for the GPU.

What to read in it: `factors` and `narrow` pay at a number of tokens where their `us` is below that of `dense`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lrserve.allocation.quality import negative_log_likelihood
from lrserve.compression.calibrate import calibrate, read_statistics
from lrserve.compression.gradients import GradientStore, collect_gradients
from lrserve.compression.groups import Group, allocated, find_groups
from lrserve.compression.refine import adam
from lrserve.compression.rounding import Rounding
from lrserve.compression.sequential import walk
from lrserve.compression.spectra import SpectrumStore, features, stacked_weight, write_spectra
from lrserve.engines.timing import Entry, input_elements, replay_layers, time_layers, weight_bytes
from lrserve.errors import one_line
from lrserve.report.machine import made
from lrserve.storage.store import write_json
from publishing import commit

SECONDS: Final = 400.0
"""After which no further part begins."""
RESIDUAL: Final = 8  # rank
STEPS: Final = 4  # of Adam
TOKENS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Shape:
    """A model, the calibration windows (sequences, length) for it, the layers (n, m) that are timed, and the large one for rates.

    `rows`: of the large layer's input, at which multiplying takes longest.
    """

    config: Mapping[str, Any]
    windows: tuple[int, int]
    layers: Sequence[tuple[int, int]]
    large: int
    rows: int


SHAPES: Final = {
    "tiny": Shape(
        {
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 256,
        },
        (4, 32),
        [(64, 128)],
        256,
        256,
    ),
    "1b": Shape(
        {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "vocab_size": 32000,
        },
        (16, 2048),
        [(2048, 2560), (2048, 11264), (5632, 2048), (4096, 4096), (4096, 28672)],
        8192,
        4096,
    ),
}
"""Made up, and TinyLlama-1.1B with layers of an 8B model besides."""


def random_model(shape: Shape, dtype: torch.dtype, device: str) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**shape.config, max_position_embeddings=4096, architectures=["LlamaForCausalLM"])
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


class Stages:
    """The stages of a run on a model, one method each, in order; each returns the numbers by which devices are compared."""

    def __init__(self, model: Any, shape: Shape, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.device = str(next(model.parameters()).device)
        self.groups = find_groups(model)
        generator = torch.Generator().manual_seed(1)
        self.windows = torch.randint(int(model.config.vocab_size), shape.windows, generator=generator)
        self.batch = 2 * shape.windows[1]

    def first(self, structure: str) -> list[Group]:
        """Return what is allocated of the first block."""
        return [unit for unit in allocated(self.groups, structure) if unit.layer == 0]  # type: ignore[arg-type]

    def calibrate(self) -> list[torch.Tensor]:
        """Covariances."""
        calibrate(self.model, self.groups, self.windows, self.folder / "c", pool_sequences=8, batch_tokens=self.batch)
        return [read_statistics(self.folder / "c", group).C for group in self.groups]

    def gradients(self) -> list[torch.Tensor]:
        """Moments of gradients; the labels are drawn by the device's own generator, so only their traces are alike."""
        collect_gradients(self.model, self.groups, self.windows, self.folder / "g", batch_tokens=self.batch, seed=0)
        store = GradientStore(self.folder / "g")
        return [torch.stack([store.read(group)[1].trace() for group in self.groups])]

    def factors(self) -> list[torch.Tensor]:
        """Two factors: what each rank leaves."""
        return self._spectra("low_rank")

    def narrow(self) -> list[torch.Tensor]:
        """Fewer neurons: what each number of them leaves."""
        return self._spectra("narrow")

    def _spectra(self, structure: str) -> list[torch.Tensor]:
        units = self.first(structure)
        write_spectra(self.model, units, features(self.folder / "c"), self.folder / structure)
        return [errors / errors[0] for errors in SpectrumStore(self.folder / structure, units).errors().values()]

    def rounding(self) -> list[torch.Tensor]:
        """int8, and int4 with a residual: the share of the outputs' power that is lost."""

        def moment(group: Group) -> torch.Tensor:
            return read_statistics(self.folder / "c", group).second_moment()

        rounding = Rounding(moment, lambda group: None, torch.bfloat16, self.device)
        lost = []
        for group in self.first("low_rank"):
            W, H = stacked_weight(self.model, group)[0].detach().float().cpu(), moment(group).float()
            power = ((W @ H) * W).sum()
            for precision in ("int8", "int4_g32"):
                rounded = rounding.weight(group, W, precision)
                E = W - rounded.dense()
                if precision != "int8":
                    E -= rounding.residual(group, W, rounded, ranks=RESIDUAL).cut(RESIDUAL).dense()
                lost.append(((E @ H) * E).sum() / power)
        return [torch.stack(lost)]

    def judge(self) -> list[torch.Tensor]:
        """Loss of each window."""
        return [negative_log_likelihood(self.model, self.windows)]

    def refine(self) -> list[torch.Tensor]:
        """Adam: the trained factors of the first block."""
        units = self.first("low_rank")
        ranks = [(unit, unit.full_rank // 2) for unit in units]
        store = SpectrumStore(self.folder / "low_rank", units)
        trained = walk(self.model, ranks, self.windows, self.folder / "r", adam(store, steps=STEPS), batch_tokens=self.batch)
        return [trained.cut(unit.name, rank).merged() for unit, rank in ranks]


STAGES: Final = ("calibrate", "gradients", "factors", "narrow", "rounding", "judge", "refine")


def agreement(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Run all stages on the CPU and on the device, and return the largest relative difference of each."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        sides = []
        for name, place in (("expected", "cpu"), ("found", device)):
            model = random_model(SHAPES["tiny"], dtype, "cpu").to(place)
            sides.append(Stages(model, SHAPES["tiny"], Path(folder) / name))
        for stage in STAGES:
            expected, own = (getattr(side, stage)() for side in sides)
            pairs = zip(expected, own, strict=True)
            found[stage] = max(float((b.double() - a.double()).norm() / a.double().norm()) for a, b in pairs)
    return found


def timed_stages(device: str, shape: Shape, over: Callable[[], bool]) -> dict[str, Any]:
    """Run the stages at a shape, and return the seconds and the peak of memory of each."""
    found: dict[str, Any] = {}
    cuda = device == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        stages = Stages(random_model(shape, torch.bfloat16, device), shape, Path(folder))
        for stage in STAGES:
            if over():
                found[stage] = None
                continue
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            getattr(stages, stage)()
            if cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            found[stage] = {"seconds": seconds, "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None}
    return found


def time_shapes(device: str, entries: Sequence[Entry], tokens: Sequence[int]) -> list[list[float]]:
    """Return microseconds of each layer, in bfloat16, at each number of rows."""
    values = torch.randn(input_elements(entries, tokens), dtype=torch.bfloat16, device=device)

    def build(entry: Entry) -> Callable[[torch.Tensor], torch.Tensor]:
        n, m, rank = entry["n"], entry["m"], entry["rank"]
        sizes = [(m, n)] if rank is None else [(rank, n), (m, rank)]
        weights = [torch.randn(size, dtype=torch.bfloat16, device=device) * size[1] ** -0.5 for size in sizes]

        def layer(x: torch.Tensor) -> torch.Tensor:
            for weight in weights:
                x = torch.nn.functional.linear(x, weight)
            return x

        return layer

    timer = replay_layers if device == "cuda" else time_layers
    with torch.inference_mode():
        table = timer(entries, tokens, 2, build, lambda count, n: values[: count * n].view(count, n), None)
    return [row for row in table if row is not None]


def entry_of(n: int, m: int, rank: int | None = None) -> Entry:
    return {"n": n, "m": m, "rank": rank, "structure": "low_rank", "ordered": False}


def rates_of(device: str, shape: Shape) -> dict[str, float]:
    """Return bytes and operations a second of the large layer."""
    entry = entry_of(shape.large, shape.large)
    [[read, multiplied]] = time_shapes(device, [entry], [1, shape.rows])
    return {
        "bytes": weight_bytes(entry, 2) / (1e-6 * read),
        "operations": 2 * shape.large**2 * shape.rows / (1e-6 * multiplied),
    }


def layer_times(device: str, shape: Shape, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the layers of a shape with their times and bounds."""
    named: list[tuple[str, Entry]] = []
    for n, m in shape.layers:
        rank = max(n * m // (n + m) // 2 // 64 * 64, 16)
        named += [("dense", entry_of(n, m)), ("factors", entry_of(n, m, rank)), ("narrow", entry_of(n, m // 2))]
    table = time_shapes(device, [entry for _, entry in named], TOKENS)
    rows = []
    for (kind, entry), us in zip(named, table, strict=True):
        size = weight_bytes(entry, 2)
        bounds = [1e6 * max(size / rates["bytes"], size * tokens / rates["operations"]) for tokens in TOKENS]
        layer = {"kind": kind, "n": entry["n"], "m": entry["m"], "rank": entry["rank"], "bytes": size}
        rows.append({**layer, "tokens": TOKENS, "us": us, "bound_us": bounds})
    return rows


def versions() -> dict[str, str]:
    found = {}
    for name in ("lrserve", "torch", "transformers", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="1b", help="of the timed stages and layers [default: 1b]")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the JSON file [default: gpu.json]")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; see what nvidia-smi says, or give --device cpu --shape tiny")
    device, shape, began = arguments.device, SHAPES[arguments.shape], time.monotonic()
    result: dict[str, Any] = {
        "made": made(),
        "commit": commit(),
        "versions": versions(),
        "device": device,
        "shape": arguments.shape,
    }
    result |= {"left_out": [], "errors": {}}

    def over() -> bool:
        return time.monotonic() - began > SECONDS

    def part(name: str, run: Callable[[], Any]) -> None:
        if over():
            result["left_out"].append(name)
            return
        try:
            found = run()
        except Exception as error:  # the other parts are worth their time all the same
            traceback.print_exc()
            result["errors"][name] = one_line(error)
            return
        result[name] = found
        result["seconds"] = time.monotonic() - began
        write_json(arguments.out, result)
        print(f"{name}: done after {result['seconds']:.0f} s", flush=True)

    def agreements() -> dict[str, dict[str, float]]:
        return {str(dtype).removeprefix("torch."): agreement(device, dtype) for dtype in (torch.float32, torch.bfloat16)}

    part("agreement", agreements)
    part("rates", lambda: rates_of(device, shape))
    part("layers", lambda: layer_times(device, shape, result["rates"]))
    part("stages", lambda: timed_stages(device, shape, over))
    result["seconds"] = time.monotonic() - began
    write_json(arguments.out, result)
    return 1 if result["errors"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
