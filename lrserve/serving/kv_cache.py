"""How large the cache of keys and values is on vLLM's CPU build, where nobody has said.

vLLM's own default there is a share of the machine's memory, and vLLM does not start where that share is not free. Then the cache
gets the size that one sequence of the context needs, and at least 1 GiB if there is so much.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeGuard

from lrserve.engines.memory import free_memory
from lrserve.errors import InputError
from lrserve.inputs.config_file import text_entries
from lrserve.serving.flags import Flags

SPACE: Final = "VLLM_CPU_KVCACHE_SPACE"
"""vLLM's variable, in GiB; it wins over vLLM's flags."""

_GIB: Final = 2**30
LEAST: Final = _GIB
"""Bytes, if the memory has them."""

_BLOCK: Final = 128  # tokens; of vLLM's cache on CPUs
_SHARE: Final = 0.92  # of the memory: vLLM's default
_PROCESSES: Final = 2 * _GIB  # of vLLM's besides weights and cache: measured 0.8 + 0.7 + 0.5
_SCALED: Final = ("dynamic", "linear")  # RoPE scalings whose factor vLLM multiplies the context by
_SUFFIXES: Final = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class Cache:
    """What a model's keys and values need.

    context: tokens of the longest sequence.
    token_bytes: for each token, in each process that shares a layer.
    """

    context: int
    token_bytes: int

    @property
    def needed(self) -> int:
        """Bytes for one sequence of the context; vLLM keeps one block for itself."""
        return (-(-self.context // _BLOCK) + 1) * _BLOCK * self.token_bytes

    def longest(self, room: int) -> int:
        """Return the context that fits into so many bytes."""
        return max(room // (_BLOCK * self.token_bytes) - 1, 0) * _BLOCK


def is_said(flags: Flags, environment: Mapping[str, str]) -> bool:
    """Say whether the user has decided about the size."""
    return bool(environment.get(SPACE) or flags.given.keys() & {"kv-cache-memory-bytes", "gpu-memory-utilization"})


def cache_argument(size: int) -> str:
    """Return vLLM's argument for a cache of so many bytes."""
    return f"--kv-cache-memory-bytes={size}"


def serving_cache(folder: Path, flags: Flags, environment: Mapping[str, str]) -> list[str]:
    """Return vLLM's argument for the size of the cache, none where vLLM or the user decides; says what it sets.

    Raises:
        InputError: the memory is too small for the context.
    """
    if is_said(flags, environment):
        return []
    cache, memory = model_cache(folder, flags), free_memory()
    if cache is None or memory is None:  # vLLM says what is wrong with the model, or takes its default
        return []
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    starts = memory.free - _PROCESSES >= _SHARE * memory.total
    room = int(_SHARE * memory.total if starts else memory.free) - weights
    if cache.needed > room:
        fits = cache.longest(room)
        shorter = f"give --max-model-len {fits} or less, or " if fits else ""
        raise InputError(
            f"a context of {cache.context:,} tokens needs {_gib(cache.needed)} for keys and values, and {_gib(max(room, 0))} are "
            f"free beside the weights; {shorter}free some memory, or set {SPACE} (GiB) yourself"
        )
    if starts:
        return []
    size = max(cache.needed, min(LEAST, room - _PROCESSES))
    print(
        f"KV cache: {_gib(size)}, for a context of {cache.context:,} tokens; vLLM's default, {_SHARE:.0%} of the memory, is not "
        f"free. For more requests at once set {SPACE} (GiB), or give --kv-cache-memory-bytes",
        file=sys.stderr,
        flush=True,
    )
    return [cache_argument(size)]


def model_cache(folder: Path, flags: Flags) -> Cache | None:
    """Return what a model's config.json and vLLM's flags say; None where they do not."""
    config = text_entries(_json(folder / "config.json"))
    layers, heads = config.get("num_hidden_layers"), config.get("num_attention_heads")
    kept, width = config.get("num_key_value_heads") or heads, config.get("head_dim")
    if width is None and _whole(config.get("hidden_size")) and _whole(heads):
        width = config["hidden_size"] // heads
    context = _context(folder, config, flags)
    if not (_whole(layers) and _whole(kept) and _whole(width) and context):
        return None
    kept = max(kept // max(_number(str(flags.given.get("tensor-parallel-size", 1))) or 1, 1), 1)
    value = 4 if flags.given.get("dtype") in ("float32", "float") else 2  # vLLM's other dtypes, and what it makes of `auto`
    return Cache(context, 2 * layers * kept * width * value)


def _context(folder: Path, config: Mapping[str, Any], flags: Flags) -> int | None:
    """Return the longest sequence as vLLM derives it."""
    if "max-model-len" in flags.given:
        return _number(str(flags.given["max-model-len"]))  # None for `auto`, which vLLM fits to its cache
    positions = config.get("max_position_embeddings")
    if not _whole(positions):
        return None
    context: float = positions
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    rope = rope if isinstance(rope, dict) else {}
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    if kind == "longrope" and _whole(original := config.get("original_max_position_embeddings")):
        context = original
    if kind in _SCALED and isinstance(factor, int | float) and math.isfinite(factor):
        context *= factor
    most = _json(folder / "tokenizer_config.json").get("model_max_length")
    return int(min(context, most)) if isinstance(most, int | float) and most >= 1 else int(context)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _whole(value: object) -> TypeGuard[int]:
    return type(value) is int and value > 0


def _number(text: str) -> int | None:
    """Read a number as vLLM does: `4096`, `32k` or `32K`; None for anything else."""
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)([kmgKMG]?)", text.strip())
    return int(float(found[1]) * _SUFFIXES.get(found[2], 1)) or None if found else None


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"
