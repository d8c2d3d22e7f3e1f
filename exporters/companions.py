"""The small files that travel with weights: tokenizer, chat template, generation config, what makes tensors of images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

_PATTERNS: Final = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates",
    "generation_config.json",
    "*processor_config.json",
)

_CODE: Final = ("auto_map", "custom_pipelines")
"""Entries of JSON files that name Python code beside the weights, which loaders run."""
_MAY_NAME_CODE: Final = ("tokenizer_config.json", "generation_config.json", "processor_config.json")
"""How the names of such files end."""


def without_code(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a JSON file without its entries that name Python code, at any depth."""
    return {
        name: without_code(value) if isinstance(value, Mapping) else value for name, value in found.items() if name not in _CODE
    }


def copy_companions(source: Path, target: Path) -> None:
    """Copy them from one model folder into another, unchanged unless they name Python code; Python files are never copied."""
    for pattern in _PATTERNS:
        for path in sorted(source.glob(pattern)):
            if path.is_dir():
                shutil.copytree(path, target / path.name, dirs_exist_ok=True)
            elif path.suffix != ".py":
                copied = Path(shutil.copy2(path, target / path.name))
                if path.name.endswith(_MAY_NAME_CODE):
                    found = json.loads(copied.read_text(encoding="utf-8"))
                    if (kept := without_code(found)) != found:
                        copied.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
