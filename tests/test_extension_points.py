"""Engines are left as they are: no file assigns to their names or registers over them."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for room in ("lrserve", "exporters") for path in (ROOT / room).rglob("*.py"))
ENGINES = ("vllm", "torch", "transformers", "onnxruntime")
SWITCHES = {"torch.backends.mkldnn.matmul.fp32_precision"}
"""What torch documents as a switch for its users to set."""
SETTERS = {"setattr", "delattr", "__setattr__", "__delattr__", "setitem", "patch", "object"}
"""Last names of functions that change an attribute of what they are given: the built-ins', pytest's and mock's."""
WRAPPERS = {"wrap_function_wrapper", "patch_function_wrapper", "wrap_object", "resolve_path"}  # wrapt's
TABLE_WRITES = {"update", "setdefault", "pop", "clear"}


def changes(source: str) -> list[str]:
    """Return every place at which a file changes something that an engine's package holds, as `line: expression`."""
    tree = ast.parse(dedent(source))
    names = _Names(tree)
    found = []
    for node in ast.walk(tree):
        wrong = [target for target in _targets(node) if names.is_held_by_engine(target)]
        if isinstance(node, ast.Call) and _changes_engine(node, names):
            wrong.append(node)
        found += [f"{place.lineno}: {ast.unparse(place)}" for place in wrong]
    return found


class _Names:
    """What the names of a file stand for, as dotted paths; imports count wherever in the file they are."""

    def __init__(self, tree: ast.AST) -> None:
        self._known: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self._known[alias.asname or alias.name.partition(".")[0]] = (
                        alias.name if alias.asname else alias.name.partition(".")[0]
                    )
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    self._known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        for node in ast.walk(tree):  # module = vllm.utils, as a statement or in an expression
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
                path = self.path(node.value)
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name) and path and is_engine(path):
                        self._known[target.id] = path

    def path(self, node: ast.AST | None) -> str | None:
        """Return the dotted path that an expression stands for, or None where it is computed."""
        if isinstance(node, ast.Name):
            return self._known.get(node.id)
        if isinstance(node, ast.Attribute):
            base = self.path(node.value)
            return base and f"{base}.{node.attr}"
        if isinstance(node, ast.Subscript) and self.path(node.value) == "sys.modules":
            return _text(node.slice)
        if isinstance(node, ast.Call) and node.args:
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in ("import_module", "__import__"):
                return _text(node.args[0])
            if name == "vars" or (name == "getattr" and not is_engine(self.path(node.args[0]) or "")):
                return self.path(node.args[0])
            if name == "getattr":
                return f"{self.path(node.args[0])}.{ast.unparse(node.args[1])}"
        return None

    def is_held_by_engine(self, target: ast.AST) -> bool:
        """Say whether a target of an assignment is an attribute, or an entry of a table, of an engine's package."""
        if not isinstance(target, (ast.Attribute, ast.Subscript)) or not is_engine(self.path(target.value) or ""):
            return False
        return self.path(target) not in SWITCHES

    def is_ours(self, node: ast.AST) -> bool:
        """Say whether an expression is a string that begins with our name, written here or imported from a module of ours."""
        text = _text(node)
        path = self.path(node)
        if text is None and path and path.startswith(("lrserve.", "exporters.")):
            module, _, name = path.rpartition(".")
            text = getattr(importlib.import_module(module), name)
        return isinstance(text, str) and (text == "lrserve" or text.startswith("lrserve::"))


def is_engine(path: str) -> bool:
    return path.partition(".")[0] in ENGINES


def _text(node: ast.AST) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _targets(node: ast.AST) -> Iterator[ast.AST]:
    """Everything that a statement assigns to or deletes, unpacked."""
    if isinstance(node, (ast.Assign, ast.Delete)):
        targets = list(node.targets)
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign, ast.For, ast.AsyncFor, ast.comprehension)):
        targets = [node.target]
    elif isinstance(node, ast.withitem) and node.optional_vars:
        targets = [node.optional_vars]
    else:
        return
    while targets:
        target = targets.pop()
        if isinstance(target, (ast.Tuple, ast.List)):
            targets += target.elts
        else:
            yield target.value if isinstance(target, ast.Starred) else target


def _changes_engine(call: ast.Call, names: _Names) -> bool:
    name = ast.unparse(call.func).rpartition(".")[2]
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    if name in SETTERS | WRAPPERS and any(is_engine(names.path(a) or _text(a) or "") for a in arguments):
        return True
    path = names.path(call.func) or ""
    if not is_engine(path):
        return False
    if name in TABLE_WRITES:
        return True
    registers = path.startswith("torch.library.") or name.startswith("register")
    return registers and not (arguments and names.is_ours(arguments[0]))


CHANGES = {
    "function of a module": "from vllm.model_executor.layers import utils\nutils.dispatch_cpu_unquantized_gemm = partial(f, g)",
    "inside a function": "def f():\n    import vllm.utils as u\n    u.x = 1",
    "setting of Inductor": "from torch._inductor import config\nconfig.aot_inductor.custom_ops_to_c_shims = {}",
    "setting, augmented": "import torch\ntorch._inductor.config.x |= {}",
    "annotated": "import torch\ntorch.nn.x: int = 1",
    "unpacked": "import torch\na, (torch.x, *torch.y) = 1, 2",
    "method of a class": "from transformers import PreTrainedModel\nPreTrainedModel.float = f",
    "deleted": "import onnxruntime as ort\ndel ort.InferenceSession",
    "loop variable": "import torch\nfor torch.x in y: pass",
    "setattr": "import torch\nsetattr(torch.nn, 'Linear', x)",
    "setattr of a class": "from torch import nn\ntype.__setattr__(nn.Linear, 'forward', x)",
    "by an alias": "import vllm\nm = vllm.attention.layer\nm.f = 1",
    "by sys.modules": "import sys\nsys.modules['vllm.utils'].x = 1",
    "by import_module": "from importlib import import_module\nimport_module('vllm.utils').x = 1",
    "by getattr": "import torch\ngetattr(torch, 'nn').Linear = x",
    "by vars": "import torch\nvars(torch)['x'] = 1",
    "by __dict__": "import torch\ntorch.__dict__.update(x=1)",
    "entry of a table": "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as M\nM['gptq'] = x",
    "table updated": "from vllm.model_executor.layers import quantization as q\nq.TABLE.update(gptq=x)",
    "operation of vLLM": "import torch\ntorch.library.impl('vllm::unified_attention_with_output', 'CPU', f)",
    "operation, decorated": "from torch import library\n@library.impl('aten::linear', 'CPU')\ndef f(): pass",
    "library of aten": "import torch\ntorch.library.Library('aten', 'IMPL')",
    "computed operation": "import torch\ntorch.library.define(name, '() -> ()')",
    "backend": "from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend\n"
    "register_backend(AttentionBackendEnum.CPU_ATTN, 'lrserve.x')",
    "name of theirs": "from vllm.model_executor.layers.quantization import register_quantization_config\n"
    "register_quantization_config('gptq')(X)",
    "model of theirs": "from vllm import ModelRegistry\nModelRegistry.register_model('LlamaForCausalLM', X)",
    "mock": "from unittest.mock import patch\npatch('vllm.utils.f', g)",
    "mock of an object": "from unittest import mock\nimport torch\nmock.patch.object(torch.nn, 'Linear', g)",
    "wrapt": "import wrapt\nwrapt.wrap_function_wrapper('transformers.modeling_utils', 'PreTrainedModel.float', f)",
}
LEAVES = {
    "own attribute": "import torch\nself.x = torch.zeros(1)\nx = torch.zeros(1)\nx.y = 1",
    "attribute of a layer": "from torch import nn\nlayer.weight = nn.Parameter(x)\nsetattr(layer, 'weight', x)",
    "object of theirs": "import onnxruntime as ort\noptions = ort.SessionOptions()\noptions.log_severity_level = 4",
    "own name": "from vllm.model_executor.layers import quantization\nfrom lrserve.compression.spec import QUANT_METHOD\n"
    "quantization.register_quantization_config(QUANT_METHOD)(X)",
    "own name, written": "from transformers.quantizers.auto import register_quantizer\nregister_quantizer('lrserve')(X)",
    "own operation": "import torch\ntorch.library.define('lrserve::packed', '() -> ()')",
    "hook of a layer": "import torch\nmodule.register_forward_pre_hook(f)",
    "function of torch": "import torch\ntorch.add(x, y)\ny = torch.nn.functional.linear(x, w)",
    "switch": "import torch\ntorch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "environment": "import os\nos.environ['VLLM_CPU_KVCACHE_SPACE'] = '1'\nos.environ.update(VLLM_X='1')",
    "name of another package": "import numpy\nnumpy.x = 1",
    "dictionary keyed by theirs": "from torch import nn\ntable = {nn.functional.linear: f}\ntable[nn.functional.linear] = g",
}


@pytest.mark.parametrize("way", CHANGES)
def test_a_change_is_found(way: str) -> None:
    assert len(changes(CHANGES[way])) == (2 if way == "unpacked" else 1)


@pytest.mark.parametrize("way", LEAVES)
def test_what_is_no_change_is_not_found(way: str) -> None:
    assert changes(LEAVES[way]) == []


def test_no_name_of_an_engine_is_changed() -> None:
    assert len(SOURCES) > 50
    found = {str(path.relative_to(ROOT)): changes(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert {path: places for path, places in found.items() if places} == {}


QUANTIZATION = "vllm/model_executor/layers/quantization/__init__.py"
BASE_CONFIG = "vllm/model_executor/layers/quantization/base_config.py"
STUBS: dict[str, tuple[dict[str, str], str]] = {
    "no quantization": ({}, "ModuleNotFoundError: No module named 'vllm.model_executor'"),
    "no base class": (
        {QUANTIZATION: ""},
        "ModuleNotFoundError: No module named 'vllm.model_executor.layers.quantization.base",
    ),
    "no table": ({QUANTIZATION: "", BASE_CONFIG: "class QuantizationConfig: pass"}, "AttributeError: module"),
    "refuses": (
        {
            QUANTIZATION: "QUANTIZATION_METHODS = []\ndef register_quantization_config(name): raise ValueError('not\\nhere')",
            BASE_CONFIG: "class QuantizationConfig: pass",
        },
        "ValueError: not here",
    ),
    "does not import": ({QUANTIZATION: "raise RuntimeError('broken')"}, "RuntimeError: broken"),
}


@pytest.mark.parametrize("stub", STUBS)
def test_vllm_that_cannot_be_extended_gets_one_line(stub: str, tmp_path: Path) -> None:
    files, reason = STUBS[stub]
    for name, text in {"vllm/__init__.py": "", **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for package in path.relative_to(tmp_path).parents[:-1]:
            (tmp_path / package / "__init__.py").touch()
    run = subprocess.run(
        [sys.executable, "-c", "from lrserve.plugins.vllm.register import register; register(); print('served')"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        cwd=tmp_path,
    )
    assert (run.returncode, run.stdout) == (0, "served\n")
    [line] = run.stderr.splitlines()
    assert line.startswith("lrserve cannot extend this vLLM (")
    assert reason in line


def test_importing_lrserve_imports_no_heavy_package() -> None:
    heavy = {*ENGINES, "accelerate", "gguf", "matplotlib", "onnx", "onnx_ir", "optuna", "peft", "scipy"}
    code = f"import sys, lrserve; print(*sorted({heavy!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "\n"
