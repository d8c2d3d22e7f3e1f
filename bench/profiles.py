"""What the ONNX graph's profile `portable` costs in speed, and how much two processes with the same graph differ.

    python bench/profiles.py                  the demo's dense model, on README's workloads and one long prompt

The dense model is exported in both profiles. Three processes of ONNX Runtime are up together and run in turns: the profile `genai`,
the same again, and `portable`. Each line is one of the last two, compared with the first. The line of the same graph shows what two
processes differ by. `portable` turns queries and keys in nodes of their own, and adds a mask to the scores of attention.

Run it with nothing else on the machine. The last line is JSON.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch

from exporters.onnx import OnnxExporter
from exporters.onnx_profiles import Profile
from inputs import readme_recipe
from lrserve.engines.onnx import OnnxEngine
from lrserve.engines.workloads import compare
from lrserve.inputs.source import open_source
from lrserve.plugins.versions import onnx_version
from lrserve.recipe import Recipe, Workload
from publishing import add_results_option, conclude_beside

LONG = Workload(prompt_tokens=4000, output_tokens=24, concurrency=1)
"""A prompt of which attention is a large part: the mask grows with the square of its length."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipe",
        type=Path,
        help="a model and its workloads, to which one long prompt is added [default: those of README's table]",
    )
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds [default: 5]")
    add_results_option(parser)
    arguments = parser.parse_args()
    recipe = Recipe.load(arguments.recipe or readme_recipe(), {})
    source, workloads = open_source(recipe.model), {**recipe.workloads, "long": LONG}
    with ExitStack() as stack:
        out = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = source.load(torch.float32)
        profiles: tuple[Profile, ...] = ("genai", "portable")
        for profile in profiles:
            (out / profile).mkdir()
            OnnxExporter(profile).export(model, source.path, out / profile, torch.float32)
        del model
        started = {"genai": "genai", "genai again": "genai", "portable": "portable"}
        engines = {label: stack.enter_context(OnnxEngine(out / profile)) for label, profile in started.items()}
        first, *others = engines.values()
        found = compare(first, others, workloads, arguments.repeats, version=onnx_version(), seed=recipe.seed)
    conclude_beside(arguments.results, onnx_version(), "genai", dict(zip(list(engines)[1:], found, strict=True)))


if __name__ == "__main__":
    main()
