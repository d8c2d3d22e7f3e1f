"""What the malloc settings of `lrserve serve` bring on the CPU, and how much two processes of the same kind differ.

    python bench/memory.py                    the demo's dense model, on its workloads
    python bench/memory.py --processes 3 --repeats 7 --compiled

Several vLLM engines of one model are up together and run in turns: `plain` ones with malloc's defaults, `kept` ones with the
settings by which malloc keeps freed memory. Each line is one engine, compared with the first plain one. The line of another plain
engine shows the difference between two processes with equal settings.

Run it with nothing else on the machine. The last line is JSON.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from inputs import bench_recipe
from lrserve.engines.workloads import compare, open_engine
from lrserve.pipeline.job import open_job
from lrserve.plugins.versions import engine_version
from lrserve.recipe import Recipe
from lrserve.serving.server import memory_environment
from publishing import add_results_option, conclude_beside


@contextmanager
def kept_memory() -> Iterator[None]:
    """Start processes with the malloc settings of `lrserve serve`."""
    os.environ["GLIBC_TUNABLES"] = memory_environment(os.environ)["GLIBC_TUNABLES"]
    try:
        yield
    finally:
        del os.environ["GLIBC_TUNABLES"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, help="a model and its workloads [default: the demo's]")
    parser.add_argument("--processes", type=int, default=2, help="engines of each kind [default: 2]")
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds [default: 5]")
    parser.add_argument("--compiled", action="store_true", help="vLLM with torch.compile; the demo's recipe is without")
    add_results_option(parser)
    arguments = parser.parse_args()
    if memory_environment(os.environ) == os.environ:
        parser.error("lrserve leaves malloc as it is here: the environment has settings for it, or glibc is too old")
    recipe = Recipe.load(arguments.recipe or bench_recipe(), {})
    workloads, model = recipe.workloads, open_job(recipe, print).source.path
    settings = recipe.engine.model_copy(update={"enforce_eager": recipe.engine.enforce_eager and not arguments.compiled})
    with ExitStack() as stack:
        engines = {}
        for number in range(arguments.processes):
            engines[f"plain {number + 1}"] = stack.enter_context(open_engine(model, workloads, settings))
            with kept_memory():
                engines[f"kept {number + 1}"] = stack.enter_context(open_engine(model, workloads, settings))
        first, *others = engines.values()
        found = compare(first, others, workloads, arguments.repeats, version=engine_version(), seed=recipe.seed)
    conclude_beside(arguments.results, engine_version(), "plain 1", dict(zip(list(engines)[1:], found, strict=True)))


if __name__ == "__main__":
    main()
