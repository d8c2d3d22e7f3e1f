"""Opening a model: a Hub id, a folder in Hugging Face layout or a GGUF file becomes a folder of safetensors.

Everything after this room reads one layout. A GGUF file is converted once, into the cache; its quantized weights are
dequantized to bfloat16, so what 4-bit rounding took away stays away.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import SafetensorError

from lrserve.errors import InputError
from lrserve.storage.store import file_sha256, replace_folder
from lrserve.storage.temporary import neighbour

if TYPE_CHECKING:
    import torch

_FINGERPRINTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
_CARD = "README.md"
_GGUF_SUFFIX = re.compile(r"([.-](I?Q\d\w*|B?F16|F32))?\.gguf", re.IGNORECASE)
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
            InputError: weights are missing or do not fit the config.
        """
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(self.path, dtype=dtype, output_loading_info=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(f"the weights in {self.path} cannot be loaded: {_one_line(error)}; check the download") from None
        model, info = loaded
        missing = sorted(info["missing_keys"])
        if missing:
            raise InputError(
                f"{self.path} lacks {len(missing)} tensors that its config promises, first {missing[0]}; check the download"
            )
        return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def fingerprint(self) -> str:
        """Identify the content of weights, config and tokenizer: sha256, as hex. Reads every file once."""
        digest = hashlib.sha256()
        for file in sorted(path for pattern in _FINGERPRINTED for path in self.path.glob(pattern)):
            digest.update(f"{file.name} {file_sha256(file)} ".encode())
        return digest.hexdigest()


def open_source(model: str) -> Source:
    """Resolve what the user calls a model to a folder of safetensors.

    Raises:
        InputError: no such path, an incomplete folder, a compressed model, or a Hub id that cannot be fetched.
    """
    source = Source(name=model, path=model_folder(model))
    if getattr(source.config(), "quantization_config", None) is not None:
        raise InputError(
            f"{source.path} is already quantized or compressed (config.json has a quantization_config); give the dense model"
        )
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
        if path.suffix != ".gguf":
            raise InputError(f"{path} is a file but not a .gguf; give the folder that holds config.json and the weights")
        return _convert_gguf(path)
    if _HUB_ID.fullmatch(model) and not model.startswith(".") and path.suffix != ".gguf":
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
    present = sorted(p.name for p in path.iterdir())
    missing = [] if (path / "config.json").is_file() else ["config.json"]
    if not list(path.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        ggufs = [name for name in present if name.endswith(".gguf")]
        hint = f"give the file itself: {path / ggufs[0]}" if ggufs else "give a folder in Hugging Face layout"
        shown = ", ".join(present[:8]) + (", ..." if len(present) > 8 else "")
        raise InputError(f"{path} lacks {' and '.join(missing)} (it holds {shown or 'nothing'}); {hint}")
    index = path / "model.safetensors.index.json"
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


def _convert_gguf(path: Path) -> Path:
    """Dequantize a GGUF file to a folder of bfloat16 safetensors in the cache, once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    target = cache_folder() / "dequantized" / f"{path.stem}-{file_sha256(path)[:16]}"
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = neighbour(target, "partial")
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config  # says "gguf", which the plain weights no longer are
        plain: Any = type(model)(model.config)
        plain.load_state_dict(model.state_dict())
        plain.to(torch.bfloat16).save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        if licence := _gguf_licence(path):
            (staging / _CARD).write_text(f"---\n{yaml.safe_dump({'license': licence})}---\n", encoding="utf-8")
    except (OSError, ValueError, KeyError, ImportError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise InputError(f"{path} cannot be read as GGUF: {_one_line(error)}; convert it to Hugging Face layout") from None
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    replace_folder(staging, target)
    return target


def _gguf_licence(path: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("general.license")
    return None if field is None else str(field.contents())
