"""torchvision for vLLM's multimodal models, in environments that have none: PyPI's does not fit a CPU build of torch.

vLLM's models of these families, and the processors of transformers, use what torchvision has in Python. What its operators are
called is declared before it is imported, as its own library of compiled operators would do.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Final

_DECLARED: Final = """import torch

library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def python_path(folder: Path) -> str:
    """Return a PYTHONPATH with which a subprocess finds torchvision; downloads it into `folder` where there is none."""
    given = os.environ.get("PYTHONPATH", "")
    if importlib.util.find_spec("torchvision") is not None:
        return given
    minor = int(metadata.version("torch").split(".")[1])
    wanted = f"torchvision==0.{minor + 15}.*"  # 0.28 is of torch 2.13
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), wanted]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("torchvision-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    (folder / "site" / "sitecustomize.py").write_text(_DECLARED)
    return os.pathsep.join(filter(None, [given, str(folder / "site")]))
