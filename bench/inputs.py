"""What the bench scripts measure on unless told otherwise: the demo's model and texts.

python bench/inputs.py     prints the path of the recipe of README's table
"""

from __future__ import annotations

from pathlib import Path

from lrserve.inputs.demo import write_recipe


def bench_recipe() -> Path:
    """Write the recipe of most scripts and return its path: 131,072 calibration tokens, vLLM without torch.compile."""
    settings = {
        "target": {"ratio": 0.2},
        "calibration": {"sequences": 256, "length": 512},
        "engine": {"enforce_eager": True},
    }
    return write_recipe("bench", settings)


def readme_recipe() -> Path:
    """Write the recipe of README's table and return its path: the demo's tokens, and vLLM compiled as stock `vllm serve` is."""
    settings = {
        "calibration": {"sequences": 128, "length": 512, "batch_tokens": 2048},
        "factorization": {"fisher_tokens": 16384, "refine_steps": 15, "refine_tokens": 16384},
        "search": {"rank_step": 32, "measured_plans": 2, "validation_tokens": 2048, "validation_pool": 8192},
        "workloads": {
            "chat": {"prompt_tokens": 64, "output_tokens": 64, "concurrency": 8},
            "prefill": {"prompt_tokens": 512, "output_tokens": 8, "concurrency": 4},
            "decode": {"prompt_tokens": 32, "output_tokens": 128, "concurrency": 1},
        },
        "report": {"tokens": 16384},
    }
    return write_recipe("readme", settings)


if __name__ == "__main__":
    print(readme_recipe())
