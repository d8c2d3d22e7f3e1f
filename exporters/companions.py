"""The small files that travel with weights: tokenizer, chat template, generation config."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

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
)


def copy_companions(source: Path, target: Path) -> None:
    """Copy them unchanged from one model folder into another; Python files are never copied."""
    for pattern in _PATTERNS:
        for path in sorted(source.glob(pattern)):
            if path.is_dir():
                shutil.copytree(path, target / path.name, dirs_exist_ok=True)
            elif path.suffix != ".py":
                shutil.copy2(path, target / path.name)
