"""What the bench scripts measure on unless told otherwise: the demo's model and texts, with more of them than the demo uses."""

from __future__ import annotations

from pathlib import Path

from lrserve.inputs.demo import write_recipe


def bench_recipe() -> Path:
    """Write the recipe, 131,072 calibration tokens and the defaults of lrserve, and return its path; vLLM without torch.compile."""
    settings = {
        "target": {"ratio": 0.2},
        "calibration": {"sequences": 256, "length": 512},
        "engine": {"enforce_eager": True},
    }
    return write_recipe("bench", settings)
