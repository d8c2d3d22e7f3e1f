"""Answers as text: prompts to tokens, tokens to text piece by piece, and `lrserve generate`.

The tokenizer is transformers', so that prompts become the same tokens as on vLLM and in calibration.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from exporters.onnx import FOLDER
from lrserve.engines.sampling import Finish, Generates, Sampling
from lrserve.errors import ArtifactError, EngineError, InputError, reading
from lrserve.inputs.config_file import text_entries
from lrserve.plugins.versions import genai_installed, installed_vllm, require_genai, require_sound_torchvision
from lrserve.serving.server import check_engine, check_model, engine_settings
from lrserve.storage.store import check_files

EngineName = Literal["onnxruntime", "vllm"]

_INCOMPLETE: Final = "\ufffd"  # what decoders make of the first bytes of a character


class Text:
    """A model's tokenizer and chat template.

    Args:
        folder: with the tokenizer's files.

    Raises:
        ArtifactError: it has none that transformers can read.
    """

    def __init__(self, folder: Path) -> None:
        require_sound_torchvision()
        from transformers import AutoTokenizer

        with reading(f"the tokenizer in {folder}", "export the model again", ArtifactError):
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.vocabulary = len(self._tokenizer)
        self.has_template = bool(self._tokenizer.chat_template)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a prompt, with what the tokenizer puts before every text, such as a BOS token."""
        return list(map(int, self._tokenizer(text)["input_ids"]))

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the tokens of a conversation, up to where the model's answer begins.

        Raises:
            InputError: there is no chat template, or it refuses these messages.
        """
        if not self.has_template:
            raise InputError("the model has no chat template; give a plain prompt")
        try:
            tokens = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
        except Exception as error:  # the template's own code: Jinja's exceptions, and whatever its expressions raise
            raise InputError(f"the model's chat template refuses the messages: {' '.join(str(error).split())[:200]}") from error
        return list(map(int, tokens))

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special tokens."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


@dataclass
class TextStream:
    """The text of tokens as they come: pieces of whole characters, which together are the text of all tokens.

    Some decoders drop a space at the beginning, so new tokens are decoded together with those of the last piece, and what they add
    is the next piece.
    """

    decode: Callable[[Sequence[int]], str]
    _tokens: list[int] = field(default_factory=list)
    _last: int = 0  # where the last piece's tokens begin, and where they end
    _told: int = 0

    def add(self, tokens: Sequence[int]) -> str:
        """Return what can be told with these tokens; empty within a character."""
        self._tokens += tokens
        text = self._new()
        if not text or text.endswith(_INCOMPLETE):
            return ""
        self._last, self._told = self._told, len(self._tokens)
        return text

    def rest(self) -> str:
        """Return what is left when no more tokens come."""
        text = self._new()
        self._last = self._told = len(self._tokens)
        return text

    def _new(self) -> str:
        before = self.decode(self._tokens[self._last : self._told])
        return self.decode(self._tokens[self._last :])[len(before) :]


@dataclass
class StopStrings:
    """Cuts a text where the first of some strings begins, and holds back what may become one of them."""

    strings: Sequence[str]
    _held: str = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Return the text that can be told, and whether a stop string came."""
        self._held += text
        found = [place for string in self.strings if (place := self._held.find(string)) >= 0]
        if found:
            return self._held[: min(found)], True
        longest = max((len(string) for string in self.strings), default=1) - 1
        beginnings = (size for size in range(min(longest, len(self._held)), 0, -1) if self._may_begin(self._held[-size:]))
        size = next(beginnings, 0)
        told, self._held = self._held[: len(self._held) - size], self._held[len(self._held) - size :]
        return told, False

    def rest(self) -> str:
        """Return what was held back, when no more text comes."""
        return self._held

    def _may_begin(self, ending: str) -> bool:
        return any(string.startswith(ending) for string in self.strings)


@dataclass(frozen=True)
class Piece:
    """A piece of an answer: text, which may be empty, the tokens of this step, and why the answer has ended, if it has."""

    text: str
    tokens: int
    finish: Finish | None = None


def answer(
    engine: Generates, decode: Callable[[Sequence[int]], str], prompt: Sequence[int], sampling: Sampling, stop: Sequence[str] = ()
) -> Generator[Piece]:
    """Yield an answer piece by piece, one for each step of the engine; closing the generator ends the generation.

    A stop string and what follows it are not told.
    """
    stream, stops = TextStream(decode), StopStrings(stop)
    with closing(engine.generate(prompt, sampling)) as steps:
        for step in steps:
            text = stream.add(step.tokens[:-1] if step.finish == "stop" else step.tokens)
            text += stream.rest() if step.finish else ""
            told, stopped = stops.add(text)
            if stopped:
                yield Piece(told, len(step.tokens), "stop")
                return
            yield Piece(told + stops.rest() if step.finish else told, len(step.tokens), step.finish)


def choose_engine(out: Path, wanted: EngineName | None = None) -> EngineName:
    """Return the engine to answer with: the wanted one, else ONNX Runtime where the graph and the package are there, else vLLM.

    Raises:
        InputError: no such folder.
        ArtifactError: nothing in it can be run.
        EngineError: nothing is installed that runs it.
    """
    if not out.is_dir():
        raise InputError(f"no folder at {out}; check the path")
    graph, checkpoint = (out / FOLDER / "genai_config.json").is_file(), (out / "config.json").is_file()
    if not graph and not checkpoint:
        raise ArtifactError(f"{out} has neither onnx/genai_config.json nor config.json; give a folder that lrserve has written")
    if wanted is not None:
        return wanted
    if graph and genai_installed():
        return "onnxruntime"
    if checkpoint and installed_vllm() is not None:
        return "vllm"
    extra = "onnx-serve" if graph else "cpu"
    raise EngineError(f"nothing is installed that runs {out}. Run: pip install 'lrserve[{extra}]'")


def checked_graph(out: Path) -> tuple[Path, int]:
    """Return the folder of an artifact's ONNX graph, and the context in tokens.

    Raises:
        EngineError: onnxruntime-genai is missing or untested.
        ArtifactError: there is no graph, or the files are not those of the manifest.
    """
    require_genai()
    path = out / FOLDER / "genai_config.json"
    if not path.is_file():
        raise ArtifactError(f"{path} is missing. Make it with: lrserve compress-and-export --export onnx")
    check_files(out, FOLDER)
    return path.parent, _context(path, "model", "context_length")


def _context(path: Path, *names: str) -> int:
    """Return the number of tokens in a JSON file, under these names."""
    try:
        found: Any = text_entries(json.loads(path.read_text(encoding="utf-8")))
        for name in names:
            found = found[name]
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} has no {'.'.join(names)} that can be read. Copy or export the model again") from error
    if type(found) is not int or found < 1:
        raise ArtifactError(f"{path}: {'.'.join(names)} is {found!r:.100}, not a number of tokens. Copy or export the model again")
    return found


def generate(
    out: Path,
    prompt: str,
    *,
    engine: EngineName | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    seed: int | None = None,
    raw: bool = False,
) -> None:
    """Print an answer as it comes, and on standard error tokens and rates.

    Args:
        out: folder of an artifact.
        prompt: a message to the model; without a chat template, and with `raw`, the beginning of a text.
        engine: see `choose_engine`.
        max_tokens, temperature, seed: see `Sampling`.
        raw: apply no chat template.

    Raises:
        LrserveError: no artifact, no engine, or a failing engine.
    """
    name = choose_engine(out, engine)
    if name == "vllm":
        check_engine()
        check_model(out)
        folder, context = out, _context(out / "config.json", "max_position_embeddings")
    else:
        folder, context = checked_graph(out)
    text = Text(folder)
    tokens = text.encode(prompt) if raw or not text.has_template else text.encode_chat([{"role": "user", "content": prompt}])
    if not tokens:
        raise InputError("the prompt has no tokens; give a longer one")
    if len(tokens) >= context:
        raise InputError(f"the prompt has {len(tokens)} tokens, and the model's context {context}; give a shorter one")
    sampling = Sampling(max_tokens=min(max_tokens, context - len(tokens)), temperature=temperature, seed=seed)
    with _engine(out, name, len(tokens) + sampling.max_tokens) as running:
        began = time.perf_counter()
        first, count, finish = began, 0, None
        for piece in answer(running, text.decode, tokens, sampling):
            if not count:
                first = time.perf_counter()  # of the first token, in the end
            count, finish = count + piece.tokens, piece.finish
            print(piece.text, end="", flush=True)
        ended = time.perf_counter()
    print()
    decode = f"; decode {(count - 1) / (ended - first):.1f} tokens/s" if count > 1 else ""
    cut = f"; cut at {sampling.max_tokens} tokens" if finish == "length" else ""
    print(
        f"{count} tokens after {len(tokens)} of the prompt on {name}; prefill {first - began:.2f} s{decode}{cut}", file=sys.stderr
    )


def _engine(out: Path, name: EngineName, tokens: int) -> Any:
    """Build (not start) an engine for one sequence of so many tokens."""
    if name == "onnxruntime":
        from lrserve.engines.genai import GenaiEngine

        return GenaiEngine(out / FOLDER)
    from lrserve.engines.gpu import require_devices
    from lrserve.engines.vllm import Engine

    settings = engine_settings(out)
    if settings is None:
        return Engine(out, dtype="auto", max_model_len=tokens, max_num_seqs=1)
    require_devices(settings.tensor_parallel_size)
    return Engine(
        out,
        dtype="auto",
        max_model_len=tokens,
        max_num_seqs=1,
        gpu_memory_utilization=settings.gpu_memory_share,
        tensor_parallel_size=settings.tensor_parallel_size,
    )
