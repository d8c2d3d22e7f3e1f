"""Opening config.json and generation_config.json: what transformers makes of them, or one line that names the entry at fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from lrserve.errors import InputError, one_line, reading, shown
from lrserve.storage.json_files import read_object

CONFIG: Final = "config.json"
_GENERATION: Final = "generation_config.json"
_ADVICE: Final = "check the download"
_MOST: Final[Mapping[str, int]] = {
    "num_hidden_layers": 1_000,
    "num_attention_heads": 10_000,
    "num_key_value_heads": 10_000,
    "head_dim": 10_000,
    "hidden_size": 1_000_000,
    "intermediate_size": 10_000_000,
    "vocab_size": 100_000_000,
    "max_position_embeddings": 100_000_000,
}
"""Entries that are counts, and what no model exceeds: it would take days to build a billion layers, even without weights."""
_DERIVED: Final = ("num_key_value_heads", "head_dim")  # null where they follow from other entries
_ENTRIES: Final = 200  # of a file, at most, are tried for the one at fault
_SPECIAL: Final = ("bos_token_id", "eos_token_id", "pad_token_id")


def load_config(folder: Path) -> Any:
    """Load the transformers config of a model's folder.

    Raises:
        InputError: config.json is damaged, or holds what no model can have; names the entry.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    path = folder / CONFIG
    content = read_object(path, _ADVICE)
    entries = text_entries(content)
    for name, most in _MOST.items():
        value = entries.get(name, 1)
        if (type(value) is not int or not 1 <= value <= most) and not (value is None and name in _DERIVED):
            raise _wrong(path, name, value, f"a whole number from 1 to {most}")
    names, kind = content.get("architectures"), content.get("model_type")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise _wrong(path, "architectures", names, "a list of names")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise _wrong(path, "model_type", kind, "one that the installed transformers knows")
    with _entry_named(path, content, CONFIG_MAPPING[kind].from_dict):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def text_entries(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a config.json, and over them those that a multimodal model's has for its LLM."""
    inside = content.get("text_config")
    return {**content, **(inside if isinstance(inside, dict) else {})}


def model_class(config: Any) -> Any:
    """Return the class of transformers (`AutoModelFor...`) that builds a model of this config with all its parts."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else AutoModelForCausalLM


def keep_one_vision_layer(config: Any) -> None:
    """Leave a multimodal model's config one layer of what reads images: for models whose weights are made up."""
    vision = getattr(config, "vision_config", None)
    for name in ("num_hidden_layers", "depth"):
        if hasattr(vision, name):
            setattr(vision, name, 1)


def build_skeleton(folder: Path) -> Any:
    """Build the model that config.json describes on the meta device: its modules and shapes.

    Raises:
        InputError: it describes none, or another one than it names; names the entry.
    """
    import torch
    from transformers import CONFIG_MAPPING

    def build(config: Any) -> Any:
        if hasattr(config, "quantization_config"):  # an artifact of ours: the dense model behind it
            del config.quantization_config
        with torch.device("meta"):
            return model_class(config).from_config(config, trust_remote_code=False)

    def build_one_layer(content: dict[str, Any]) -> Any:
        small = {"num_hidden_layers": 1, "layer_types": None}
        inside = {"text_config": {**content["text_config"], **small}} if isinstance(content.get("text_config"), dict) else small
        return build(CONFIG_MAPPING[content["model_type"]].from_dict({**content, **inside}))

    config, path = load_config(folder), folder / CONFIG
    with _entry_named(path, read_object(path, _ADVICE), build_one_layer):
        model = build(config)
    if (built := type(model).__name__) not in (names := config.architectures or [built]):
        raise _wrong(path, "architectures", names, f"{built}, of model_type {config.model_type}")
    return model


def require_known_tokens(folder: Path) -> None:
    """Check that the embedding has the tokens that config.json and generation_config.json name: BOS, EOS and padding.

    Raises:
        InputError: it has not, or one of the files is damaged.
    """
    from transformers import GenerationConfig

    rows = load_config(folder).get_text_config().vocab_size
    for path in (folder / CONFIG, folder / _GENERATION):
        if not path.exists():
            continue
        content = read_object(path, _ADVICE)
        if path.name == _GENERATION:
            with _entry_named(path, content, GenerationConfig.from_dict):
                GenerationConfig.from_pretrained(folder)
        for name in _SPECIAL:
            value = text_entries(content).get(name)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            least = -1 if name == "pad_token_id" else 0  # -1 is none
            if not all(type(token) is int and least <= token < rows for token in ids):
                raise _wrong(path, name, value, f"among the {rows} tokens of the embedding (0 to {rows - 1})")


@contextmanager
def _entry_named(path: Path, content: Mapping[str, Any], build: Callable[[dict[str, Any]], object]) -> Iterator[None]:
    """As `reading`, and where the file's content without one entry can be built, name that entry."""
    try:
        with reading(path, _ADVICE):
            yield
    except InputError as error:
        for name in list(content)[:_ENTRIES]:
            with suppress(Exception):
                build({own: value for own, value in content.items() if own != name})
                break
        else:
            raise
        reason = error if error.__cause__ is None else one_line(error.__cause__)
        raise InputError(f"{path}: {name} {shown(content[name])} does not do: {reason}; {_ADVICE}") from error


def _wrong(path: Path, name: str, value: Any, wanted: str) -> InputError:
    return InputError(f"{path}: {name} must be {wanted}; got {shown(value)}; {_ADVICE}")
