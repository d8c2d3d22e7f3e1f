"""Run as `python image_generate.py FOLDER PROMPT IMAGE`: what plain vLLM makes of a prompt with an image; JSON, the last line."""

from __future__ import annotations

import json
import sys

from PIL import Image
from vllm import LLM, SamplingParams


def main(folder: str, prompt: str, image: str) -> None:
    llm = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=2,
        kv_cache_memory_bytes=2**26,
        limit_mm_per_prompt={"image": 1},
        enable_prefix_caching=False,
    )
    request = {"prompt": prompt, "multi_modal_data": {"image": Image.open(image)}}
    (answer,) = llm.generate([request], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, prompt_logprobs=1))
    logprobs = [step[token].logprob for token, step in zip(answer.prompt_token_ids[1:], answer.prompt_logprobs[1:], strict=True)]
    print(json.dumps({"prompt": answer.prompt_token_ids, "logprobs": logprobs, "tokens": list(answer.outputs[0].token_ids)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
