"""Inputs for a search at the size of 1B on two cores: a checkpoint with random weights in a shape of speed.py, and a recipe.

    python bench/shape.py shape --model 1b --min-speedup 1.3
    lrserve compress-and-export --recipe shape/recipe.yaml -o shape/plan
    python bench/speed.py --model 1b --plan shape/plan/lrserve/plan.json

The clock does not see values, so the plan's speed is that of a real model; its perplexity has no meaning. Statistics of random
weights need few tokens. The tokenizer's tokens are bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lrserve.inputs.demo import demo_texts
from speed import MODELS, model_config


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the bytes of the text, and an end of sequence."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to put the checkpoint and recipe.yaml")
    parser.add_argument("--model", choices=MODELS, default="1b")
    parser.add_argument("--min-speedup", type=float, default=1.3)
    arguments = parser.parse_args()
    checkpoint = arguments.folder / "model"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(model_config(arguments.model), dtype=torch.bfloat16).save_pretrained(checkpoint)
    byte_tokenizer().save_pretrained(checkpoint)
    texts = demo_texts()
    recipe = {
        "model": str(checkpoint.resolve()),
        "target": {"min_speedup": arguments.min_speedup},
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
    (arguments.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    main()
