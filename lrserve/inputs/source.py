"""Opening a model: a Hub id, a folder in Hugging Face layout or a GGUF file becomes a folder of safetensors.

Everything after this room reads one layout. A GGUF file is converted once, into the cache; its quantized weights are
dequantized to bfloat16, so what 4-bit rounding took away stays away.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import SafetensorError

from lrserve.errors import InputError, one_line, reading, shown
from lrserve.inputs.config_file import CONFIG, build_skeleton, load_config
from lrserve.storage.json_files import read_object
from lrserve.storage.space import Place, require_space
from lrserve.storage.store import file_sha256, replace_folder
from lrserve.storage.yaml_files import MOST_BYTES, load_modest

if TYPE_CHECKING:
    import torch

_FINGERPRINTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
_CARD = "README.md"
_GGUF_SUFFIX = re.compile(r"([.-](I?Q\d\w*|B?F16|F32))?\.gguf", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
_DOWNLOAD = "check the download"
_DEQUANTIZED = 4  # bytes of a converted file over those of the GGUF file, which has 4 bits a weight and more


def cache_folder() -> Path:
    """Return the user's cache folder for lrserve: $LRSERVE_CACHE, else under $XDG_CACHE_HOME, else ~/.cache/lrserve."""
    with reading("LRSERVE_CACHE, XDG_CACHE_HOME or HOME", "set LRSERVE_CACHE to a folder"):
        return Path(
            os.environ.get("LRSERVE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lrserve"
        ).expanduser()


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
            raise InputError(f"the weights in {self.path} cannot be loaded: {one_line(error)}; {_DOWNLOAD}") from None
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
    missing = [] if (path / CONFIG).is_file() else [CONFIG]
    if not list(path.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        ggufs = [name for name in present if name.endswith(".gguf")]
        hint = f"give the file itself: {path / ggufs[0]}" if ggufs else "give a folder in Hugging Face layout"
        held = ", ".join(present[:8]) + (", ..." if len(present) > 8 else "")
        raise InputError(f"{path} lacks {' and '.join(missing)} (it holds {held or 'nothing'}); {hint}")
    index = path / "model.safetensors.index.json"
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


def _convert_gguf(path: Path) -> Path:
    """Dequantize a GGUF file to a folder of bfloat16 safetensors in the cache, once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    target = cache_folder() / "dequantized" / f"{path.stem}-{file_sha256(path)[:16]}"
    if (target / CONFIG).is_file():
        return target
    require_space([cache_place(_DEQUANTIZED * path.stat().st_size)])
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f"{target.name}.partial-{os.getpid()}")
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
        raise InputError(f"{path} cannot be read as GGUF: {one_line(error)}; convert it to Hugging Face layout") from None
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    replace_folder(staging, target)
    return target


def _gguf_licence(path: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("general.license")
    return None if field is None else str(field.contents())
