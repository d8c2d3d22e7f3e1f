"""One ONNX Runtime session over an exported graph, and greedy decoding with its KV cache, which stays on the session's device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from exporters.onnx import LAST_FILE, MODEL_FILE
from lrserve.engines.onnx_provider import Provider, missing_cuda, no_cuda, quiet_options, session_on
from lrserve.engines.transcripts import Transcript
from lrserve.errors import ArtifactError, EngineError, InputError
from lrserve.recipe import Dtype

Tokens = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]

TYPES: Final[Mapping[Dtype, tuple[str, int]]] = {
    "float32": ("tensor(float)", 1),
    "float16": ("tensor(float16)", 10),
    "bfloat16": ("tensor(bfloat16)", 16),
}
"""ONNX Runtime's name of a tensor's type, and ONNX's number of its elements'."""


def open_session(
    path: Path,
    threads: int | None = None,
    entries: Mapping[str, str] | None = None,
    *,
    provider: Provider = "cpu",
    exact: bool = False,
    spinning: bool = False,
) -> Any:
    """Open an `onnxruntime.InferenceSession` over a saved graph.

    Args:
        path: of the graph.
        threads: torch's number by default, so that the two can be compared.
        entries: further session config entries.
        provider: what computes.
        exact: multiply by rounded weights without rounding what is multiplied by them.
        spinning: let idle threads wait actively, which burns cores that are shared.

    Raises:
        EngineError: ONNX Runtime cannot load the graph, or has not this provider.
    """
    options = quiet_options()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    for name, value in (entries or {}).items():
        options.add_session_config_entry(name, value)
    try:
        graph: str | bytes = str(path)
        if exact:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
            graph = _exact(path)
        session = session_on(graph, options, provider)
    except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
        raise EngineError(f"ONNX Runtime cannot load {path}; export the model again: {error}") from error
    if provider == "cuda" and (reason := missing_cuda(session)):
        raise no_cuda(reason)
    return session


def _exact(path: Path) -> bytes:
    """Return a graph, without its weights, whose products by rounded weights are in float32."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    serialized: bytes = model.SerializeToString()
    return serialized


class OnnxDecoder:
    """One ONNX Runtime session (`open_session`) over an exported graph, and the KV cache of the batch that it is decoding.

    `vocabulary` is V, `dtype` the graph's number format. `bound` says whether inputs and outputs are bound to the device
    (ONNX Runtime's IO binding), without which a GPU's cache would be copied to the host and back at every token. Binding takes
    the host a tenth of a millisecond at every token, so on the CPU it is left out.
    """

    def __init__(
        self, path: Path, threads: int | None = None, *, provider: Provider = "cpu", exact: bool = False, spinning: bool = False
    ) -> None:
        import onnxruntime

        if not path.is_file():
            there = ", ".join(sorted(entry.name for entry in path.parent.iterdir())) if path.parent.is_dir() else ""
            raise ArtifactError(
                f"no ONNX graph at {path} (the folder {f'holds: {there}' if there else 'is missing or empty'}); "
                "export the model with the onnx exporter first"
            )
        self._runtime: Any = onnxruntime
        self._session = open_session(path, threads, provider=provider, exact=exact, spinning=spinning)
        self._device = provider
        self.bound = provider != "cpu"
        outputs = self._session.get_outputs()
        self._outputs = [output.name for output in outputs]
        self.vocabulary = int(outputs[0].shape[-1])
        # (name, key/value heads, head width) of every cache input; its values never leave the device.
        inputs = self._session.get_inputs()
        caches = [cache for cache in inputs if cache.name.startswith("past_key_values.")]
        self._caches = [(cache.name, cache.shape[1], cache.shape[3]) for cache in caches]
        self.dtype = next(dtype for dtype, (name, _) in TYPES.items() if name == caches[0].type)
        self._positions = any(value.name == "position_ids" for value in inputs)
        self._past: dict[str, Any] = {}
        self._length = 0

    def prefill(self, tokens: Tokens) -> Logits:
        """Start over with a batch of prompts of equal length: tokens (B, T) -> logits (B, T, V)."""
        self._start(len(tokens))
        return self._run(tokens)

    def step(self, tokens: Tokens) -> Logits:
        """Append one token to every sequence: tokens (B,) -> logits (B, V) of the next."""
        return self._run(tokens[:, None])[:, 0]

    def _start(self, batch: int) -> None:
        self._length = 0
        empty, element = self._runtime.OrtValue.ortvalue_from_shape_and_type, TYPES[self.dtype][1]
        self._past = {name: empty([batch, heads, 0, width], element, self._device, 0) for name, heads, width in self._caches}

    def _value(self, array: npt.NDArray[Any]) -> Any:
        return self._runtime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))

    def _run(self, tokens: Tokens) -> Logits:
        batch, new = tokens.shape
        mask = np.ones((batch, self._length + new), np.int64)
        feed = {"input_ids": self._value(tokens), "attention_mask": self._value(mask), **self._past}
        if self._positions:
            positions = np.arange(self._length, self._length + new, dtype=np.int64)
            feed["position_ids"] = self._value(np.broadcast_to(positions, tokens.shape))
        try:
            logits, *present = self._run_bound(feed) if self.bound else self._session.run_with_ort_values(self._outputs, feed)
        except Exception as error:
            raise EngineError(
                f"ONNX Runtime failed on {batch} sequences of {self._length} + {new} tokens; "
                f"a shorter prompt may fit the model's context: {error}"
            ) from error
        self._past = {name: value for (name, _, _), value in zip(self._caches, present, strict=True)}
        self._length += new
        return np.asarray(_Borrowed(logits))

    def _run_bound(self, feed: Mapping[str, Any]) -> list[Any]:
        """Run with IO binding: what is fed is copied to where it is wanted; caches stay on the device, and logits leave it."""
        binding = self._session.io_binding()
        for name, value in feed.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, "cpu" if name == self._outputs[0] else self._device, 0)
        self._session.run_with_iobinding(binding)
        return list(binding.get_outputs())


class _Borrowed:
    """A float32 OrtValue as numpy reads it: not copied (a prefill's logits are hundreds of megabytes), and kept alive."""

    def __init__(self, value: Any) -> None:
        self._value = value
        data = (value.data_ptr(), True)  # read-only
        self.__array_interface__ = {"version": 3, "typestr": "<f4", "shape": tuple(value.shape()), "data": data}


def transcribe(graph: Callable[[str], OnnxDecoder], prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Transcript]:
    """Run prompts one by one: log probabilities of their tokens, then exactly `new_tokens` greedy ones, past any EOS.

    Args:
        graph: returns the session of a graph by its file's name: of `MODEL_FILE`, which has all logits, for the log probabilities,
            then of `LAST_FILE`, which is the one that is served, for the tokens.
        prompts: token ids.
        new_tokens: of each.

    Raises:
        InputError: a prompt without tokens.
        EngineError: ONNX Runtime failed.
    """
    if not all(map(len, prompts)):
        raise InputError("a prompt without tokens cannot be run; a prompt needs at least one token")
    rows = [np.asarray(prompt, np.int64) for prompt in prompts]
    logprobs = [_log_probabilities(graph(MODEL_FILE).prefill(ids[None])[0, :-1], ids[1:]) for ids in rows]
    greedy = [_continue(graph(LAST_FILE), ids, new_tokens) if new_tokens else ((), ()) for ids in rows]
    return [Transcript(tuple(own.tolist()), *continued) for own, continued in zip(logprobs, greedy, strict=True)]


def _continue(decoder: OnnxDecoder, ids: Tokens, new_tokens: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return the greedy tokens after `ids` (T,), and the gaps between the two best log probabilities."""
    row = decoder.prefill(ids[None])[0, -1]
    tokens: list[int] = []
    margins: list[float] = []
    for number in range(new_tokens):
        if number:
            row = decoder.step(np.array(tokens[-1:], np.int64))[0]
        second, best = np.partition(row, -2)[-2:]
        tokens.append(int(row.argmax()))
        margins.append(float(best - second))  # the normalizer is the same for both
    return tuple(tokens), tuple(margins)


def _log_probabilities(logits: Logits, tokens: Tokens) -> npt.NDArray[np.float64]:
    """Natural-log probabilities (T,) of `tokens` (T,) under `logits` (T, V)."""
    peak = logits.max(axis=-1)
    total = np.log(np.exp(logits - peak[:, None]).sum(axis=-1, dtype=np.float64))
    chosen = logits[np.arange(len(tokens)), tokens].astype(np.float64)
    result: npt.NDArray[np.float64] = chosen - peak - total
    return result
