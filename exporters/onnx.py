"""ONNX export: a folder `onnx/` that ONNX Runtime, onnxruntime-genai, optimum and transformers.js load as it is."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from exporters.base import Transcript
from exporters.companions import copy_companions
from exporters.onnx_graph import build_graph, check_renderable, head_width, save_graph
from lrserve.errors import ArtifactError, EngineError, InputError

FOLDER: Final = "onnx"
MODEL_FILE: Final = "model.onnx"
PACKAGES: Final = ("onnx", "onnx_ir", "onnxruntime")

Tokens = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


def require_packages() -> None:
    """Raise EngineError, with the pip command, if a package that writes or runs graphs is missing."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise EngineError(
            f"ONNX graphs need {', '.join(missing)}, not installed in this environment: "
            "run pip install 'lrserve[onnx]', or export for vLLM only"
        )


class OnnxExporter:
    """Renders the compressed model as one float32 ONNX graph with a KV cache.

    The tolerance: the graph's operators sum in another order than torch's. Over five families and real models that
    moves a prompt log probability by 1e-6 to 4e-4 nats in float32, and an error worth the name (a window off by one
    token, a lost bias) by far more than 0.002.
    """

    name: str = "onnx"
    tolerance: float = 2e-3

    def preflight(self, skeleton: Any) -> None:
        """Check packages and model.

        Raises:
            EngineError: a package that writes or runs the graph is not installed.
            UnsupportedModelError: the graph would not render this model faithfully.
        """
        require_packages()
        check_renderable(skeleton)

    def export(self, model: Any, source: Path, out: Path, dtype: torch.dtype) -> None:
        """Write `out`/onnx: graph and weights, and the configs and tokenizer files that its loaders want.

        config.json comes from `source` where there is one, since other loaders may not read what this version of
        transformers writes; otherwise from the model (a GGUF file has none).

        Raises:
            EngineError: a package is missing.
            UnsupportedModelError: the graph would not render this model faithfully.
        """
        require_packages()
        import onnx

        folder = out / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        save_graph(build_graph(model), folder / MODEL_FILE)
        # By path: a model in memory is limited to 2 GiB.
        onnx.checker.check_model(str(folder / MODEL_FILE), full_check=True)
        copy_companions(source, folder)
        config = _read_json(source / "config.json") or model.config.to_dict()
        config.pop("quantization_config", None)  # the graph holds plain float32 tensors, whatever the source was
        _write_json(folder / "config.json", config)
        generation = _read_json(source / "generation_config.json")
        _write_json(folder / "genai_config.json", genai_config(model.config, generation))

    def transcribe(self, out: Path, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, list[Transcript]]:
        """Run the prompts, one by one, through `out`/onnx/model.onnx on the CPU.

        Decoding is greedy, with the KV cache, and does not stop at an end-of-sequence token.

        Raises:
            EngineError: a package is missing, or ONNX Runtime fails.
            ArtifactError: there is no exported graph in `out`.
            InputError: an empty prompt.
        """
        require_packages()
        for number, prompt in enumerate(prompts):
            if not prompt:
                raise InputError(f"prompt {number} has no tokens; a prompt needs at least one")
        decoder = OnnxDecoder(out / FOLDER / MODEL_FILE)
        return {"onnxruntime": [_transcript(decoder, prompt, new_tokens) for prompt in prompts]}


def open_session(path: Path, threads: int | None = None, entries: Mapping[str, str] | None = None) -> Any:
    """Open an `onnxruntime.InferenceSession` over a saved graph, on the CPU: CUDA has no float32 kernel of GroupQueryAttention.

    `threads` defaults to torch's number, so that the two can be compared; `entries` are further session config entries.

    Raises:
        EngineError: ONNX Runtime cannot load the graph.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads would burn shared cores
    options.log_severity_level = 4  # failures arrive as exceptions; printing them too is noise
    for name, value in (entries or {}).items():
        options.add_session_config_entry(name, value)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
        raise EngineError(f"ONNX Runtime cannot load {path}; export the model again: {error}") from error


class OnnxDecoder:
    """One ONNX Runtime session (`open_session`) over an exported graph, and the KV cache of the batch that it is decoding.

    `vocabulary` is V.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        import onnxruntime

        if not path.is_file():
            there = ", ".join(sorted(entry.name for entry in path.parent.iterdir())) if path.parent.is_dir() else ""
            raise ArtifactError(
                f"no ONNX graph at {path} (the folder {f'holds: {there}' if there else 'is missing or empty'}); "
                "export the model with the onnx exporter first"
            )
        self._runtime: Any = onnxruntime
        self._session = open_session(path, threads)
        outputs = self._session.get_outputs()
        self._outputs = [output.name for output in outputs]
        self.vocabulary = int(outputs[0].shape[-1])
        # (name, key/value heads, head width) of every cache input; its values never leave the runtime.
        caches = [cache for cache in self._session.get_inputs() if cache.name.startswith("past_key_values.")]
        self._caches = [(cache.name, cache.shape[1], cache.shape[3]) for cache in caches]
        self._past: dict[str, Any] = {}
        self._length = 0

    def prefill(self, tokens: Tokens) -> Logits:
        """Start over with a batch of prompts of equal length: tokens (B, T) -> logits (B, T, V)."""
        self._length = 0
        self._past = {
            name: self._value(np.zeros((len(tokens), heads, 0, width), np.float32)) for name, heads, width in self._caches
        }
        return self._run(tokens)

    def step(self, tokens: Tokens) -> Logits:
        """Append one token to every sequence: tokens (B,) -> logits (B, V) of the next."""
        return self._run(tokens[:, None])[:, 0]

    def _value(self, array: npt.NDArray[Any]) -> Any:
        return self._runtime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))

    def _run(self, tokens: Tokens) -> Logits:
        batch, new = tokens.shape
        mask = np.ones((batch, self._length + new), np.int64)
        feed = {"input_ids": self._value(tokens), "attention_mask": self._value(mask), **self._past}
        try:
            logits, *present = self._session.run_with_ort_values(self._outputs, feed)
        except Exception as error:
            raise EngineError(
                f"ONNX Runtime failed on {batch} sequences of {self._length} + {new} tokens; "
                f"a shorter prompt may fit the model's context: {error}"
            ) from error
        self._past = {name: value for (name, _, _), value in zip(self._caches, present, strict=True)}
        self._length += new
        return np.asarray(_Borrowed(logits))


class _Borrowed:
    """A float32 OrtValue as numpy reads it: not copied (a prefill's logits are hundreds of megabytes), and kept alive."""

    def __init__(self, value: Any) -> None:
        self._value = value
        data = (value.data_ptr(), True)  # read-only
        self.__array_interface__ = {"version": 3, "typestr": "<f4", "shape": tuple(value.shape()), "data": data}


def genai_config(config: Any, generation: Mapping[str, Any]) -> dict[str, Any]:
    """Build the genai_config.json by which onnxruntime-genai loads the graph.

    `generation` is the content of generation_config.json: chat models keep their full list of end tokens there.
    """
    special = {name: generation.get(name, getattr(config, name, None)) for name in ("bos_token_id", "eos_token_id")}
    pad = generation.get("pad_token_id", getattr(config, "pad_token_id", None))
    if pad is None:
        eos = special["eos_token_id"]
        pad = eos[0] if isinstance(eos, (list, tuple)) else eos
    special["pad_token_id"] = pad
    context = int(config.max_position_embeddings)
    return {
        "model": {
            **{name: token for name, token in special.items() if token is not None},
            "context_length": context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": MODEL_FILE,
                "head_size": head_width(config),
                "hidden_size": config.hidden_size,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "num_key_value_heads": config.num_key_value_heads,
            },
            "type": config.model_type,
            "vocab_size": config.vocab_size,
        },
        "search": {
            "do_sample": False,
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
            "early_stopping": True,
            "length_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            "diversity_penalty": 0.0,
        },
    }


def _transcript(decoder: OnnxDecoder, prompt: Sequence[int], new_tokens: int) -> Transcript:
    ids = np.asarray(prompt, np.int64)
    logits = decoder.prefill(ids[None])[0]  # (T, V)
    logprobs = _log_probabilities(logits[:-1], ids[1:])
    row = logits[-1]
    tokens: list[int] = []
    margins: list[float] = []
    for number in range(new_tokens):
        if number:
            row = decoder.step(np.array(tokens[-1:], np.int64))[0]
        second, best = np.partition(row, -2)[-2:]
        tokens.append(int(row.argmax()))
        margins.append(float(best - second))  # the normalizer is the same for both
    return Transcript(logprobs=tuple(logprobs.tolist()), tokens=tuple(tokens), margins=tuple(margins))


def _log_probabilities(logits: Logits, tokens: Tokens) -> npt.NDArray[np.float64]:
    """Natural-log probabilities (T,) of `tokens` (T,) under `logits` (T, V)."""
    peak = logits.max(axis=-1)
    total = np.log(np.exp(logits - peak[:, None]).sum(axis=-1, dtype=np.float64))
    chosen = logits[np.arange(len(tokens)), tokens].astype(np.float64)
    result: npt.NDArray[np.float64] = chosen - peak - total
    return result


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, an empty one if there is no such file."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
