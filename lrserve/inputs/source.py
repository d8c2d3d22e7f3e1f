"""Opening a model: a Hub id, a folder in Hugging Face layout or a GGUF file becomes a folder of safetensors.

Everything after this room reads one layout. A GGUF file is converted once, into the cache; its quantized weights are
dequantized to bfloat16, so what 4-bit rounding took away stays away.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import SafetensorError

from lrserve.errors import InputError
from lrserve.inputs.checkpoint import INDEX, check_checkpoint, instead_of_weights
from lrserve.storage.store import file_sha256

if TYPE_CHECKING:
    import torch

_FINGERPRINTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
_CARD = "README.md"
_GGUF = ".gguf"
_GGUF_SUFFIX = re.compile(r"([.-](I?Q\d\w*|B?F16|F32))?(-\d{5}-of-\d{5})?\.gguf", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def cache_folder() -> Path:
    """Return the user's cache folder for lrserve: $LRSERVE_CACHE, else under $XDG_CACHE_HOME, else ~/.cache/lrserve."""
    if own := os.environ.get("LRSERVE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lrserve"


@dataclass(frozen=True)
class Source:
    """A dense model on disk: what the user called it, and the folder of safetensors it was resolved to."""

    name: str
    path: Path

    @property
    def title(self) -> str:
        """The Hub id, or the last part of a local path, of a GGUF file without the ending and the kind of quantization."""
        if not (path := Path(self.name).expanduser()).exists():
            return self.name
        return _GGUF_SUFFIX.sub("", path.name) if path.is_file() else path.resolve().name

    def card(self) -> dict[str, Any]:
        """Return the metadata of the model card: the YAML at the head of its README.md; empty where there is none."""
        try:
            text = (self.path / _CARD).read_text(encoding="utf-8")
            found = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else None
        except (OSError, UnicodeDecodeError, yaml.YAMLError, IndexError):
            return {}
        return found if isinstance(found, dict) else {}

    def config(self) -> Any:
        """Load the transformers config.

        Raises:
            InputError: config.json is damaged.
        """
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.path)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{self.path / 'config.json'} cannot be read: {_one_line(error)}; check the download") from None

    def tokenizer(self) -> Any:
        """Load the tokenizer.

        Raises:
            InputError: there is none, or it is damaged.
        """
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise InputError(
                f"no usable tokenizer in {self.path}: {_one_line(error)}; copy the model's tokenizer files there"
            ) from None

    def skeleton(self) -> Any:
        """Build the model on the meta device: its modules and shapes, without reading a weight."""
        import torch
        from transformers import AutoModelForCausalLM

        config = self.config()
        if hasattr(config, "quantization_config"):  # an artifact of ours: the dense model behind it
            del config.quantization_config
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)

    def load(self, dtype: torch.dtype) -> Any:
        """Load the dense model for evaluation, on the CPU or the first CUDA device.

        Raises:
            InputError: the weights cannot be read.
        """
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(self.path, dtype=dtype)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(f"the weights in {self.path} cannot be loaded: {_one_line(error)}; check the download") from None
        return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def fingerprint(self) -> str:
        """Identify the content of weights, config and tokenizer: sha256, as hex. Reads every file once."""
        digest = hashlib.sha256()
        for file in sorted(path for pattern in _FINGERPRINTED for path in self.path.glob(pattern)):
            digest.update(f"{file.name} {file_sha256(file)} ".encode())
        return digest.hexdigest()


def open_source(model: str, accept: Callable[[Any], object] = lambda config: None) -> Source:
    """Resolve what the user calls a model to a folder of safetensors, whose headers are those of the dense model of its config.

    Args:
        model: a Hub id, a folder or a GGUF file.
        accept: raises for the config of a model that the caller cannot use, before the weights are looked at.

    Raises:
        InputError: no such path, an incomplete folder, weights that are not the config's, a compressed model, or a Hub id that
            cannot be fetched.
    """
    source = Source(name=model, path=model_folder(model))
    config = source.config()
    accept(config)
    check_checkpoint(source.path, source.skeleton(), getattr(config, "quantization_config", None))
    return source


def model_folder(model: str) -> Path:
    """Return the folder that holds a model, dense or compressed: a Hub id is downloaded, a GGUF file converted, once.

    Raises:
        InputError: no such path, an incomplete folder, or a Hub id that cannot be fetched.
    """
    place = os.path.expanduser(model)  # unlike pathlib's, neither this nor what follows raises for strange names
    path = Path(place)
    if os.path.isdir(place):
        return checked_folder(path)
    if os.path.isfile(place):
        if path.suffix.lower() != _GGUF:
            raise InputError(f"{path} is a file but not a .gguf; give the folder that holds config.json and the weights")
        try:
            from lrserve.inputs.gguf import convert_gguf
        except ModuleNotFoundError as error:
            raise InputError(f"GGUF files need {error.name}, not installed here. Run: pip install 'lrserve[compress]'") from None
        return convert_gguf(path, cache_folder())
    if _HUB_ID.fullmatch(model) and not model.startswith(".") and path.suffix.lower() != _GGUF:
        return _from_hub(model)
    raise InputError(f"no model at {path}: there is no such file or folder; check the path")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


def checked_folder(path: Path) -> Path:
    """Return the absolute path of a folder in Hugging Face layout.

    Raises:
        InputError: config.json, the weights or one of their shards is missing.
    """
    if instead := instead_of_weights(path):
        raise InputError(instead)
    present = sorted(p.name for p in path.iterdir())
    missing = [] if (path / "config.json").is_file() else ["config.json"]
    if not list(path.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        ggufs = [name for name in present if name.lower().endswith(_GGUF)]
        hint = f"give the file itself: {path / ggufs[0]}" if ggufs else "give a folder in Hugging Face layout"
        shown = ", ".join(present[:8]) + (", ..." if len(present) > 8 else "")
        raise InputError(f"{path} lacks {' and '.join(missing)} (it holds {shown or 'nothing'}); {hint}")
    index = path / INDEX
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        absent = sorted(shards - set(present))
        if absent:
            raise InputError(f"{path} lacks {len(absent)} of {len(shards)} shards, first {absent[0]}; finish the download")
    return path.resolve()


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(model, allow_patterns=[*_FINGERPRINTED, _CARD], ignore_patterns=["consolidated*"])
    except Exception as error:
        # huggingface_hub's own exceptions, and those of the HTTP client underneath, share no base class
        raise InputError(
            f"no model at {model!r}: no such file or folder, and the Hub does not deliver it "
            f"({type(error).__name__}: {_one_line(error)}); check the name, the network and HF_TOKEN"
        ) from None
    return checked_folder(Path(folder))
