"""vLLM's flags as far as lrserve has to understand them: where the server listens, its keys and names, and its memory.

vLLM itself parses them a second time; what is not listed here is passed on unread.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

import yaml

from lrserve.errors import InputError, one_line

DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORT: Final = 8000
KEY_VARIABLE: Final = "VLLM_API_KEY"
OWN_KEY_VARIABLE: Final = "LRSERVE_API_KEY"

_VALUES: Final = (
    "dtype",
    "gpu-memory-utilization",
    "host",
    "kv-cache-memory-bytes",
    "max-model-len",
    "port",
    "tensor-parallel-size",
    "uds",
)
_LISTS: Final = ("api-key", "served-model-name")
_SWITCHES: Final = ("grpc", "headless", "ssl-certfile", "ssl-keyfile")
_UNSET: Final = ("", "None")  # values that vLLM takes for none
_ALIASES: Final = {"gpu-memory-utilization": "--device-memory-utilization", "tensor-parallel-size": "-tp"}


@dataclass(frozen=True)
class Flags:
    """What vLLM will make of its arguments and of the file that --config names; None is what nobody has set.

    given: by name, such as `max-model-len`.
    on_line: names of those that stand among the arguments.
    """

    given: Mapping[str, Any]
    on_line: frozenset[str] = field(default_factory=frozenset)

    @property
    def host(self) -> str:
        """The address to listen at; an empty one is all of the machine's."""
        host = str(self.given.get("host", DEFAULT_HOST))
        return "" if host in _UNSET else host

    @property
    def is_file(self) -> bool:
        """Whether the server listens at a socket in the file system, and at no port."""
        return self.given.get("uds", "") not in _UNSET

    @property
    def port(self) -> int | None:
        """The port; None where vLLM will refuse it."""
        port = str(self.given.get("port", DEFAULT_PORT))
        return int(port) if port.isdecimal() and int(port) < 2**16 else None

    def keys(self, environment: Mapping[str, str]) -> list[str]:
        """Return the keys of which a client must show one; none, and the server is open."""
        keys = self.given.get("api-key") or [environment.get(KEY_VARIABLE)]
        return [key for key in keys if key and key not in _UNSET]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"a flag of vLLM: {message}")


def _parser() -> _Parser:
    parser = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    for name in _VALUES:
        parser.add_argument(f"--{name}", *([_ALIASES[name]] if name in _ALIASES else []), dest=name)
    for name in _LISTS:
        parser.add_argument(f"--{name}", dest=name, nargs="+")
    for name in _SWITCHES:
        parser.add_argument(f"--{name}", dest=name, nargs="?", const=True)
    return parser


def read_flags(arguments: Sequence[str]) -> Flags:
    """Read vLLM's arguments; those on the command line win over those of the file, as in vLLM.

    Raises:
        InputError: a flag without its value, or a file that cannot be read.
    """
    on_line = vars(_parser().parse_known_args(_plain(arguments))[0])
    return Flags({**_from_file(arguments), **on_line}, frozenset(on_line))


def without(arguments: Sequence[str], *names: str) -> list[str]:
    """Return vLLM's arguments without some flags."""
    parser = _Parser(add_help=False)
    for name in names:
        parser.add_argument(f"--{name}", nargs="+" if name in _LISTS else None)
    return parser.parse_known_args(_plain(arguments))[1]


def _plain(arguments: Sequence[str]) -> list[str]:
    """Write names with hyphens; vLLM takes `--api_key` for `--api-key`."""
    return [re.sub(r"^--[^.=]*", lambda name: name[0].replace("_", "-"), argument) for argument in arguments]


def settings_of_file(arguments: Sequence[str]) -> dict[str, Any]:
    """Return what the file says that vLLM's arguments name by --config, by names with hyphens; nothing without one.

    Raises:
        InputError: it cannot be read.
    """
    if "--config" not in arguments:  # vLLM does not read --config=FILE either
        return {}
    place = arguments.index("--config") + 1
    if place == len(arguments):
        raise InputError("a flag of vLLM: --config needs a file")
    try:
        found = yaml.safe_load(Path(arguments[place]).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"vLLM's --config {arguments[place]} cannot be read: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise InputError(f"vLLM's --config {arguments[place]} holds no settings; write one a line, such as port: 8000")
    return {str(name).replace("_", "-"): value for name, value in found.items()}


def _from_file(arguments: Sequence[str]) -> dict[str, Any]:
    """Return what a file says of the flags that are known here."""
    found = settings_of_file(arguments)
    found = {name: found.get(alias.lstrip("-")) for name, alias in _ALIASES.items()} | found
    lists = {name: found[name] if isinstance(found[name], list) else [found[name]] for name in _LISTS if found.get(name)}
    plain = {name: found[name] for name in (*_VALUES, *_SWITCHES) if found.get(name) not in (None, False)}
    return {**plain, **lists}
