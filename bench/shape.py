"""A checkpoint with random weights in a shape of speed.py, 0.5B to 8B, and a recipe for a search with it on two cores.

    python bench/shape.py shape --model 1b --min-speedup 1.3
    lrserve compress-and-export --recipe shape/recipe.yaml -o shape/plan
    python bench/speed.py --model 1b --plan shape/plan/lrserve/plan.json

The clock does not see values, so the plan's speed is that of a real model; its perplexity has no meaning. Statistics of random
weights need few tokens. The tokenizer's tokens are bytes. `--short` makes a recipe with little of everything and without rounding,
for what a run costs by stage (bench/cost.py), and `--layers` a model of fewer layers.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from lrserve.inputs.demo import demo_texts
from speed import MODELS, model_config


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the bytes of the text, and an end of sequence."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def write_random(config: LlamaConfig, checkpoint: Path) -> None:
    """Write a checkpoint of random bfloat16 weights, a file for each decoder layer: one of them is in memory at a time."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    checkpoint.mkdir(parents=True)
    config.save_pretrained(checkpoint)
    generator = torch.Generator().manual_seed(0)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():  # tied ones once
        layer = re.search(r"layers\.(\d+)\.", name)
        files.setdefault(f"model-{layer[1] if layer else 'rest'}.safetensors", {})[name] = parameter.shape
    for file, shapes in files.items():
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.empty(shape, dtype=torch.bfloat16).normal_(0, config.initializer_range, generator=generator)
            for name, shape in shapes.items()
        }
        save_file(tensors, checkpoint / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, shapes in files.items() for name in shapes}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def recipe_for(checkpoint: Path, texts: Mapping[str, Path], min_speedup: float, neurons: int, short: bool) -> dict[str, Any]:
    """Return a recipe for a checkpoint with random weights and so many neurons in an MLP, with texts by use."""
    recipe: dict[str, Any] = {
        "model": str(checkpoint.resolve()),
        "target": {"min_speedup": min_speedup},
        "text": {use: str(texts[use]) for use in ("calibration", "validation", "report")},
        "calibration": {"sequences": 4, "length": 512, "pool_sequences": 2},
        "factorization": {"fisher": [], "refine": "none"},
        "search": {
            "trials": 12,
            "rank_step": 256,
            "probe_tokens": 128,
            "validation_tokens": 512,
            "validation_pool": 1024,
            "validation_length": 128,
            "measured_plans": 2,
        },
        "workloads": {
            "chat": {"prompt_tokens": 64, "output_tokens": 32, "concurrency": 8},
            "prefill": {"prompt_tokens": 512, "output_tokens": 4, "concurrency": 4},
            "decode": {"prompt_tokens": 32, "output_tokens": 64, "concurrency": 1},
        },
        "report": {"tokens": 1024, "length": 512, "prompts": 2, "prompt_tokens": 32, "new_tokens": 16},
        "export": ["vllm"],
    }
    if short:
        step = 1024 if neurons > 4096 else 128
        recipe |= {
            "target": {"ratio": 0.4},  # which any engine can meet
            "calibration": {"sequences": 4, "length": 64, "pool_sequences": 2},
            "factorization": {"weights": [], "fisher": [], "refine": "none"},
            "search": {
                "trials": 3,
                "rank_step": step,
                "width_step": step,
                "depth_groups": 1,
                "probe_tokens": 64,
                "validation_tokens": 64,
                "validation_pool": 64,
                "validation_length": 64,
                "measured_plans": 1,
            },
            "workloads": {"decode": {"prompt_tokens": 8, "output_tokens": 8, "concurrency": 1}},
            "engine": {"enforce_eager": True, "repeats": 2},
            "report": {"tokens": 64, "length": 64, "prompts": 2, "prompt_tokens": 8, "new_tokens": 4},
        }
    return recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to put the checkpoint and recipe.yaml")
    parser.add_argument("--model", choices=MODELS, default="1b")
    parser.add_argument("--min-speedup", type=float, default=1.3)
    parser.add_argument("--layers", type=int, help="decoder layers [default: those of the shape]")
    parser.add_argument("--short", action="store_true", help="few tokens, trials and prompts")
    arguments = parser.parse_args()
    checkpoint = arguments.folder / "model"
    config = model_config(arguments.model)
    config.num_hidden_layers = arguments.layers or config.num_hidden_layers
    write_random(config, checkpoint)
    byte_tokenizer().save_pretrained(checkpoint)
    recipe = recipe_for(checkpoint, demo_texts(), arguments.min_speedup, config.intermediate_size, arguments.short)
    (arguments.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    main()
