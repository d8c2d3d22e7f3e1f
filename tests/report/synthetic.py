"""What a run could have found, as metrics.json and the search's report have it; no engine, no model."""

from __future__ import annotations

from typing import Any

WORKLOADS = {
    "chat": {"prompt_tokens": 128, "output_tokens": 128, "concurrency": 8, "share": 0.7},
    "long <prompts>": {"prompt_tokens": 1024, "output_tokens": 32, "concurrency": 4, "share": 0.3},
}
MADE = {
    "date": "2026-11-29T07:10:00+00:00",
    "machine": {"processor": "AMD EPYC", "instructions": [], "cores": 2, "memory_gb": 25, "gpu": None},
}


def trial(number: int, origin: str, perplexity: float, speedup: float, **more: Any) -> dict[str, Any]:
    found = {"number": number, "origin": origin, "perplexity": perplexity, "speedup": speedup, "ratio": 0.2, "bytes": 0.8}
    return {**found, "complete": True, "front": False, **more}


def measured(number: int | None, origin: str, perplexity: float, speedup: float, why_not: str | None = None) -> dict[str, Any]:
    found = {"predicted": speedup - 0.02, "speedup": speedup, "lowest": speedup - 0.03, "highest": speedup + 0.02}
    plan = {"number": number, "origin": origin, "perplexity": perplexity, "corrected": speedup - 0.01, **found}
    return {**plan, "chosen": why_not is None, "why_not": why_not, "workloads": {name: dict(found) for name in WORKLOADS}}


def kind(layers: int, width: int) -> list[dict[str, Any]]:
    cells = []
    for layer in range(layers):
        rank = None if layer % 4 == 3 else width // (2 + layer % 3)
        cell = {"layer": layer, "rank": rank, "dense_rank": width, "kept": 1.0 if rank is None else rank / width}
        rounded = {"weights": "int8", "residual": 0} if layer % 3 == 1 else {"weights": None, "residual": 0}
        cells.append({**cell, **({"weights": "int4_g32", "residual": 16} if layer % 8 == 3 else rounded)})
    return cells


def search(layers: int = 30) -> dict[str, Any]:
    return {
        "title": "SmolLM2-135M-Instruct",
        "target": "ratio 0.2",
        "engine": "vllm 0.32.0+cpu",
        "dtype": "bfloat16",
        "structure": "narrow",
        "workloads": WORKLOADS,
        "dense": {"perplexity": 33.61},
        "trials": [
            trial(0, "loss_aware", 42.4, 1.07, front=True),
            trial(1, "greedy", 55.0, 1.05),
            trial(2, "uniform", 2.4e7, 1.04),
            trial(3, "trial 3", 47.0, 1.12, front=True),
            trial(4, "trial 4", 60.0, 1.11, complete=False),
            trial(5, "trial 5", 41.0, 1.03, front=True),
        ],
        "rule": "the lowest of everything",
        "measured": [
            measured(0, "loss_aware", 42.4, 1.08),
            measured(3, "trial 3", 47.0, 1.09, why_not="it misses <something>"),
            measured(5, "trial 5", 41.0, 1.02, why_not="it is slower"),
            measured(None, "int8 everywhere", 34.0, 1.11, why_not="it is larger than what was asked for"),
        ],
        "importances": {"perplexity": {"base": 0.6, "down.0": 0.4}, "speed": {"down.0": 0.9, "base": 0.1}},
        "plan": {"layers": layers, "kinds": {"qkv": kind(layers, 576), "o": kind(layers, 576), "down": kind(layers, 1536)}},
        "search": {
            "trials": 6,
            "stopped_early": 1,
            "trials_per_minute": 14.2,
            "seconds_forward": 70.1,
            "seconds_rewrite": 20.0,
            "seconds_sampler": 9.9,
            "standard_error": 0.004,
        },
    }


def metrics(**changes: Any) -> dict[str, Any]:
    def size(dense: float, compressed: float) -> dict[str, float]:
        return {"dense": dense, "compressed": compressed, "ratio": 1 - compressed / dense}

    def side(rate: float) -> dict[str, float]:
        return {"tokens_per_second": rate, "lowest": rate - 5, "highest": rate + 5, "cpu_seconds": 3.0}

    speedup = {"rounds": 5, "speedup": 1.08, "speedup_lowest": 1.05, "speedup_highest": 1.1, "undisturbed_speedup": 1.09}
    served = {"mean": 0.026, "largest": 0.21, "greedy_equal": 291, "greedy_tokens": 512}
    found = {
        "made": MADE,
        "model": {"name": "HuggingFaceTB/SmolLM2-135M-Instruct", "architecture": "LlamaForCausalLM", "licence": {}},
        "target": "ratio 0.2",
        "dtype": "bfloat16",
        "exports": ["vllm", "onnx"],
        "runtime": "vllm",
        "enforce_eager": False,
        "workloads": WORKLOADS,
        "plan": {
            "origin": "loss_aware",
            "usual": False,
            "structure": "narrow",
            "groups": 90,
            "factorized": 81,
            "rounded": {"int8": 30, "int4_g32": 4},
            "residuals": 4,
        },
        "measured_plans": [
            {"origin": origin, "usual": usual, "chosen": not usual, "validation_perplexity": ppl, "linear_bytes": size, **speedup}
            for origin, usual, ppl, size in (("int8 everywhere", True, 34.0, 0.5), ("loss_aware", False, 42.4, 0.8))
        ],
        "improved": {"refine": {"method": "adam", "tokens": 4096, "steps": 25}},
        "sizes": {
            "linear_parameters": size(106.2e6, 84.9e6),
            "model_parameters": size(134.5e6, 113.2e6),
            "bytes": size(269e6, 226.4e6),
            "flops_per_token": size(269e6, 226.1e6),
        },
        "perplexity": {
            "validation": {"dense": 33.61, "searched": 42.4, "compressed": 38.21},
            "report": {"dense": 31.5, "compressed": 36.75, "increase": 36.75 / 31.5 - 1, "tokens": 32768, "length": 1024},
        },
        "throughput": {
            "engine": "vllm 0.32.0+cpu",
            **speedup,
            "workloads": {
                name: {"share": load["share"], "dense": side(350.0), "compressed": side(378.0), **speedup}
                for name, load in WORKLOADS.items()
            },
        },
        "agreement": {
            "vllm": {
                "max_logprob_difference": 3.1e-4,
                "tolerance": 0.005,
                "greedy_equal": 128,
                "greedy_tokens": 128,
                "as_served": {
                    "dtype": "bfloat16",
                    "compiled": True,
                    "factor": 3.0,
                    "floor": 1e-3,
                    "dense": {**served, "greedy_equal": 275},
                    "compressed": served,
                },
            },
            "onnxruntime": {"max_logprob_difference": 2e-5, "tolerance": 0.001, "greedy_equal": 127, "greedy_tokens": 128},
        },
        "versions": {
            "python": "3.11.2",
            "engine": "vllm 0.32.0+cpu",
            "lrserve": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.17.0",
        },
    }
    return {**found, **changes}
