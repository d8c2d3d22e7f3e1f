"""Opening a model: a Hub id, a folder in Hugging Face layout or a GGUF file becomes a folder of safetensors.

Everything after this room reads one layout. A GGUF file is converted once, into the cache; its quantized weights are
dequantized to bfloat16, so what 4-bit rounding took away stays away.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from lrserve.errors import InputError, one_line, reading, shown
from lrserve.inputs.checkpoint import INDEX, check_checkpoint, instead_of_weights, stored_dtype
from lrserve.inputs.config_file import CONFIG, build_skeleton, load_config, model_class
from lrserve.inputs.identity import content_id
from lrserve.storage.json_files import read_object
from lrserve.storage.space import Place
from lrserve.storage.yaml_files import MOST_BYTES, load_modest

if TYPE_CHECKING:
    import torch

_FINGERPRINTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
_CARD = "README.md"
_GGUF = ".gguf"
_GGUF_SUFFIX = re.compile(r"([.-](I?Q\d\w*|B?F16|F32))?(-\d{5}-of-\d{5})?\.gguf", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
_DOWNLOAD = "check the download"


def cache_folder() -> Path:
    """Return the user's cache folder for lrserve: $LRSERVE_CACHE, else under $XDG_CACHE_HOME, else ~/.cache/lrserve."""
    with reading("LRSERVE_CACHE, XDG_CACHE_HOME or HOME", "set LRSERVE_CACHE to a folder"):
        return Path(
            os.environ.get("LRSERVE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lrserve"
        ).expanduser()


def device_for(dtype: torch.dtype) -> str:
    """Return where a model is computed: in 16 bits on the first CUDA device where there is one, else on the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() and dtype.itemsize < 4 else "cpu"


def cache_place(needed: int) -> Place:
    """Return the cache as a place into which so many bytes will be written (`space.require_space`)."""
    return Place("the cache (LRSERVE_CACHE)", cache_folder().absolute(), needed)


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
        path = self.path / _CARD
        try:
            with path.open(encoding="utf-8") as file:
                text = file.read(MOST_BYTES)
            found = load_modest(text.split("---", 2)[1], str(path)) if text.startswith("---") else None
        except Exception:  # a card is for people, and no run depends on it
            return {}
        return found if isinstance(found, dict) else {}

    def config(self) -> Any:
        """Load the transformers config.

        Raises:
            InputError: as `load_config`.
        """
        return load_config(self.path)

    def tokenizer(self) -> Any:
        """Load the tokenizer.

        Raises:
            InputError: there is none, or it is damaged.
        """
        from transformers import AutoTokenizer

        with reading(f"the tokenizer in {self.path}", "copy the model's tokenizer files there"):
            tokenizer = AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
            tokenizer("a")  # what some damages only then show
        return tokenizer

    def skeleton(self) -> Any:
        """Build the model on the meta device: its modules and shapes, without reading a weight.

        Raises:
            InputError: as `build_skeleton`.
        """
        return build_skeleton(self.path)

    def load(self, dtype: torch.dtype | None) -> Any:
        """Load the dense model for evaluation, where `device_for` says.

        In the dtype in which it is stored (None), its weights are pages of its files on the CPU: read when they are first used,
        and memory that the system takes back where it is short.

        Raises:
            InputError: the weights cannot be read.
        """
        import torch
        from transformers.utils import logging

        logging.disable_progress_bar()
        dtype = dtype or stored_dtype(self.path)
        try:
            model: Any = model_class(self.config()).from_pretrained(self.path, dtype=dtype)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(f"the weights in {self.path} cannot be loaded: {one_line(error)}; {_DOWNLOAD}") from None
        for module in model.modules():  # Gemma's embedding rounds its scale to the weights' dtype by itself
            if (scale := getattr(module, "scalar_embed_scale", None)) is not None:
                module.embed_scale = torch.tensor(float(scale))
        return model.eval().to(device_for(dtype))

    def fingerprint(self) -> str:
        """Identify the content of weights, config and tokenizer: sha256 of their `content_id`, as hex."""
        digest = hashlib.sha256()
        for file in sorted(path for pattern in _FINGERPRINTED for path in self.path.glob(pattern)):
            digest.update(f"{file.name} {content_id(file)} ".encode())
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
        return convert_gguf(path, cache_place)
    if _HUB_ID.fullmatch(model) and not model.startswith(".") and path.suffix.lower() != _GGUF:
        return _from_hub(model)
    raise InputError(f"no model at {shown(place, 300)}: there is no such file or folder; check the path")


def checked_folder(path: Path) -> Path:
    """Return the absolute path of a folder in Hugging Face layout.

    Raises:
        InputError: config.json, the weights or one of their shards is missing, or the index of the shards is damaged.
    """
    with reading(path, "choose a folder that you may read"):
        present = sorted(p.name for p in path.iterdir())
    strange = [file for pattern in _FINGERPRINTED for file in path.glob(pattern) if not file.is_file()]
    if strange:  # a pipe would be waited for
        raise InputError(f"{strange[0]} is no regular file; remove it, or finish the download")
    if instead := instead_of_weights(path):
        raise InputError(instead)
    missing = [] if (path / CONFIG).is_file() else [CONFIG]
    if not list(path.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        ggufs = [name for name in present if name.lower().endswith(_GGUF)]
        hint = f"give the file itself: {path / ggufs[0]}" if ggufs else "give a folder in Hugging Face layout"
        held = ", ".join(present[:8]) + (", ..." if len(present) > 8 else "")
        raise InputError(f"{path} lacks {' and '.join(missing)} (it holds {held or 'nothing'}); {hint}")
    index = path / INDEX
    if index.is_file():
        names = read_object(index, _DOWNLOAD).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise InputError(f"{index}: weight_map must name a file for each tensor; got {shown(names)}; {_DOWNLOAD}")
        shards = set(names.values())
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
            f"({one_line(error)}); check the name, the network and HF_TOKEN"
        ) from None
    return checked_folder(Path(folder))
