"""A tiny random Llama with a tokenizer, a chat template and an ONNX graph, and what transformers answers."""

from __future__ import annotations

import re
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from tiny import VOCABULARY, dense_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from exporters.onnx import OnnxExporter

CONTEXT = 8192
TEMPLATE = (
    "{% for message in messages %}{% if message['content'] == 'no' %}{{ raise_exception('not this') }}{% endif %}"
    "{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def tokenizer(*, template: bool = True) -> Any:
    """Reads ASCII, one token a byte. Other tokens are two letters, or bytes of longer characters, which seldom make one."""
    special, letters = ["<pad>", "<bos>", "<eos>"], string.ascii_letters
    written = [f"{a}{b}" for a, b in zip(letters * 3, letters[7:] + letters[9:] + letters, strict=False)]
    ascii_bytes = ["Ġ", "Ċ", *map(chr, range(33, 127))]  # space and newline, as byte-level tokenizers write them
    others = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(ascii_bytes))[-60:]
    tokens = [*special, *ascii_bytes, *others, *written][:VOCABULARY]
    inner = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[], unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    found = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    found.chat_template = TEMPLATE if template else None
    return found


def write_graph(place: Path, *, template: bool = True) -> tuple[Any, Path]:
    """Write a dense model to `place`/dense and its graph to `place`/out; return the model and the latter."""
    model = dense_model("LlamaForCausalLM")
    model.config.max_position_embeddings = CONTEXT
    model.save_pretrained(place / "dense")
    tokenizer(template=template).save_pretrained(place / "dense")
    OnnxExporter().export(model, place / "dense", place / "out", torch.float32)
    return model, place / "out"


def chat_prompt(content: str) -> str:
    """What the template makes of one message."""
    return f"user: {content}\nassistant: "


def greedy(model: Any, prompt: str, tokens: int, *, bos: bool = True) -> str:
    """Return the text of exactly so many greedy tokens of transformers, the end token among them or not."""
    ids = tokenizer()(prompt, add_special_tokens=bos, return_tensors="pt")["input_ids"]
    made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)
    text: str = tokenizer().decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return text


START = "from lrserve.cli import main; main()"


@contextmanager
def running(
    out: Path, log: Path, *flags: str, engine: str = "onnxruntime", port: int = 0, patience: float = 60
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run `lrserve serve` and yield the process and its address once it is ready."""
    command = [sys.executable, "-c", START, "serve", str(out), "--engine", engine, "--port", str(port), *flags]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + patience
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            found = re.search(r"on (http://127\.0\.0\.1:\d+)", log.read_text())
            try:
                if found and httpx.get(f"{found[1]}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        yield process, found[1]
    finally:
        process.kill()
        process.wait()
