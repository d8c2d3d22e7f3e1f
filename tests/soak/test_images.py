"""An image through plain vLLM, which builds all parts of a multimodal artifact, held against transformers in float32.

Gemma 3 only: transformers' processors of the other families need torchvision here too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from PIL import Image
from tiny import IMAGE_TOKEN, VOCABULARY, factorized_model, write_artifact
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from with_torchvision import python_path

from lrserve.inputs.source import Source

pytestmark = pytest.mark.soak

ARCHITECTURE: Final = "Gemma3ForConditionalGeneration"
NEWLINES: Final = ["\n", "\n\n", "\n\n\n", "\n\n\n\n"]
MARKS: Final = ["<end_of_image>", "<start_of_image>", "<image_soft_token>"]
PROMPT: Final = "ab<start_of_image>cd"


def processor() -> Any:
    """Gemma's, of images of 28 x 28 pixels and a tokenizer of single bytes with Gemma's own tokens at the end."""
    alphabet, special = sorted(pre_tokenizers.ByteLevel.alphabet()), ["<pad>", "<bos>", "<eos>"]
    bytes_kept = VOCABULARY - len(special) - len(NEWLINES) - len(MARKS)
    tokens = [*special, *alphabet[:bytes_kept], *NEWLINES, *MARKS]
    assert tokens.index("<image_soft_token>") == IMAGE_TOKEN
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[], unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(NEWLINES)
    tokenizer.add_special_tokens(MARKS)
    names = dict(zip(("eoi_token", "boi_token", "image_token"), MARKS, strict=True))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", extra_special_tokens=names
    )
    return Gemma3Processor(Gemma3ImageProcessorPil(size={"height": 28, "width": 28}), fast, image_seq_length=4)


@torch.inference_mode()
def test_vllm_reads_an_image_as_transformers_does(tmp_path: Path, soak_row: Callable[..., None]) -> None:
    started = time.perf_counter()
    folder = write_artifact(factorized_model(ARCHITECTURE, layers=5, apart=True), tmp_path / "model")
    made = processor()
    made.save_pretrained(folder)
    image = Image.effect_noise((28, 28), 80).convert("RGB")
    image.save(tmp_path / "image.png")
    script, inputs = Path(__file__).with_name("image_generate.py"), made(text=PROMPT, images=image, return_tensors="pt")
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = python_path(tmp_path / "torchvision")
    done = subprocess.run(
        [sys.executable, str(script), str(folder), PROMPT, str(tmp_path / "image.png")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["prompt"] == inputs["input_ids"][0].tolist()
    model = Source(name="model", path=folder).load(torch.float32)
    expected = model(**inputs).logits[0, :-1].log_softmax(-1).gather(1, inputs["input_ids"][0, 1:, None])[:, 0]
    without = model(input_ids=inputs["input_ids"]).logits[0, :-1].log_softmax(-1).gather(1, inputs["input_ids"][0, 1:, None])[:, 0]
    largest = float((torch.tensor(found["logprobs"]) - expected).abs().max())
    assert (without - expected).abs().max() > 0.1  # the image matters
    failed = int(largest > 1e-3)
    soak_row(
        f"{ARCHITECTURE} in vLLM, an image", 1, failed, time.perf_counter() - started, f"largest difference {largest:.1g} nats"
    )
