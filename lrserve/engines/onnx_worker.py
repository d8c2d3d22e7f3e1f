"""The process around one ONNX graph: `python -m lrserve.engines.onnx_worker`, started by engines/onnx.py.

What the two say to each other is in engines/protocol.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from exporters.onnx import FOLDER, LAST_FILE
from lrserve.engines.onnx_latency import latency_table as measure
from lrserve.engines.onnx_provider import Provider
from lrserve.engines.onnx_session import OnnxDecoder
from lrserve.engines.onnx_session import transcribe as transcribe_prompts
from lrserve.engines.protocol import serve
from lrserve.engines.timing import random_prompts
from lrserve.errors import ArtifactError, InputError


@dataclass
class Loaded:
    """A folder of graphs, of which one is open, the tokens that they have positions for, and how a session is opened."""

    folder: Path
    context: int
    threads: int | None
    provider: Provider
    exact: bool
    opened: dict[str, OnnxDecoder]

    def decoder(self, name: str) -> OnnxDecoder:
        """Return one graph's session; it takes the place of another graph's, whose weights would need as much memory again."""
        if name not in self.opened:
            self.opened.clear()
            self.opened[name] = OnnxDecoder(self.folder / name, self.threads, provider=self.provider, exact=self.exact)
        return self.opened[name]


def build_engine(settings: dict[str, Any]) -> Loaded:
    """Open the graph. Its context is read from genai_config.json, which, unlike config.json, the exporter always writes itself.

    Raises:
        ArtifactError: the graph or that file is missing.
    """
    folder = Path(settings["model"]) / FOLDER
    threads, provider, exact = settings["threads"], settings["provider"], settings["exact"]
    opened = {LAST_FILE: OnnxDecoder(folder / LAST_FILE, threads, provider=provider, exact=exact)}
    path = folder / "genai_config.json"
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; export the model with the onnx exporter again")
    context = int(json.loads(path.read_text(encoding="utf-8"))["model"]["context_length"])
    return Loaded(folder, context, threads, provider, exact, opened)


def throughput(loaded: Loaded, prompt_tokens: int, output_tokens: int, concurrency: int, seed: int) -> dict[str, Any]:
    """Generate greedily for random prompts, one batch, as a server does: without the logits of prompts.

    Seconds are wall-clock, and CPU time of this process.
    """
    if min(prompt_tokens, output_tokens, concurrency) < 1:
        raise InputError(f"{concurrency} requests of {prompt_tokens} + {output_tokens} tokens: there must be at least one of each")
    if prompt_tokens + output_tokens > loaded.context:
        raise InputError(f"{prompt_tokens} + {output_tokens} tokens are more than the model's context, {loaded.context}")
    decoder = loaded.decoder(LAST_FILE)
    prompts = np.array(random_prompts(decoder.vocabulary, prompt_tokens, concurrency, seed), np.int64)
    began, cpu_began = time.perf_counter(), time.process_time()
    tokens = [decoder.prefill(prompts)[:, -1].argmax(-1)]
    while len(tokens) < output_tokens:
        tokens.append(decoder.step(tokens[-1]).argmax(-1))
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "output_tokens": sum(map(len, tokens))}


def latency_table(
    loaded: Loaded, entries: list[dict[str, Any]], tokens: list[int], dtype: str, seconds: float | None
) -> dict[str, Any]:
    """Time single layers (engines/onnx_latency.py)."""
    own = loaded.decoder(LAST_FILE).dtype
    if dtype != own:
        raise InputError(f"the ONNX graph computes in {own}, not in {dtype}; ask for layers in {own}")
    return {"microseconds": measure(entries, tokens, loaded.threads, seconds, dtype=own, provider=loaded.provider)}


def transcribe(loaded: Loaded, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Run the prompts one by one."""
    return {"transcripts": [asdict(found) for found in transcribe_prompts(loaded.decoder, prompts, new_tokens)]}


REQUESTS: Final[dict[str, Callable[..., dict[str, Any]]]] = {
    "throughput": throughput,
    "transcribe": transcribe,
    "latency_table": latency_table,
}


if __name__ == "__main__":
    serve(build_engine, REQUESTS)
