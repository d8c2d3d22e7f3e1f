"""What the export of an ONNX graph costs, and what a prompt gains where the logits of its last token are enough.

    python bench/onnx_export.py                     the model of README's table
    python bench/onnx_export.py --model FOLDER      a dense model's folder instead

    seconds      of one export in a process of its own, from the model on disk to both graphs, checked
    peak         resident memory of that process at its highest, over the bytes of the float32 weights
    prefill      time of a prompt by `model.onnx`, which has the logits of all tokens, over that by `model_last.onnx`; in turns

Run it with nothing else on the machine. The last line is JSON.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from exporters.onnx import FOLDER, LAST_FILE, MODEL_FILE, OnnxExporter
from inputs import readme_recipe
from lrserve.engines.onnx_session import OnnxDecoder
from lrserve.engines.timing import random_prompts
from lrserve.inputs.source import open_source
from lrserve.plugins.versions import onnx_version
from lrserve.recipe import Recipe
from lrserve.report.card import table
from publishing import add_results_option, conclude

PROMPTS: Final = (128, 512, 2048)


def export(model: str, out: Path) -> dict[str, float]:
    """Export a dense model; returns seconds, and bytes at the peak of this process and of its weights."""
    source = open_source(model)
    began = time.perf_counter()
    loaded = source.load(None)
    OnnxExporter().export(loaded, source.path, out, torch.float32)
    seconds = time.perf_counter() - began
    weights = 4 * sum(parameter.numel() for parameter in loaded.parameters())
    return {"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "weights": weights}


def prefill_ratios(folder: Path, tokens: int, rounds: int) -> list[float]:
    """Time of a prompt with the logits of all tokens over that with the last token's, round by round."""
    decoders = [OnnxDecoder(folder / name) for name in (MODEL_FILE, LAST_FILE)]
    ratios = []
    for number in range(rounds + 1):
        seconds = []
        for decoder in decoders:
            prompt = np.array(random_prompts(decoder.vocabulary, tokens, 1, number), np.int64)
            began = time.perf_counter()
            decoder.prefill(prompt)
            seconds.append(time.perf_counter() - began)
        ratios += [seconds[0] / seconds[1]] if number else []  # the first one warms up
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a dense model's folder [default: that of README's table]")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds [default: 7]")
    add_results_option(parser)
    arguments = parser.parse_args()
    model = Recipe.load(readme_recipe(), {"model": arguments.model}).model
    with tempfile.TemporaryDirectory(prefix="lrserve-") as place:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            cost = pool.apply(export, (model, Path(place)))
        prefills = {str(tokens): prefill_ratios(Path(place) / FOLDER, tokens, arguments.rounds) for tokens in PROMPTS}
    found: dict[str, Any] = {**cost, "prefill": prefills}
    lines = [[n, f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"] for n, ratios in prefills.items()]
    markdown = (
        f"{open_source(model).title}, {onnx_version()}, float32. Export: {cost['seconds']:.1f} s, peak memory "
        f"{cost['peak'] / 1e6:.0f} MB, {cost['peak'] / cost['weights']:.2f} times the {cost['weights'] / 1e6:.0f} MB of the "
        f"weights.\n\n"
        f"{table(['tokens of the prompt', 'all logits over the last'], lines)}\n\n"
        f"Time of prefill, median (spread) of {arguments.rounds} rounds in turns.\n"
    )
    conclude(arguments.results, markdown, found)


if __name__ == "__main__":
    main()
