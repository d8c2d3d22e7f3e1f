"""Proof that a graph in float16 or bfloat16 is its float32 twin with rounded numbers.

The twin, which the same model is rendered as in float32, can be held against that model closely. What the two graphs differ in is
then found here, exactly: types, and conversions between them.
"""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import numpy as np

from exporters.onnx_linear import FLOATS
from lrserve.errors import AgreementError

_ACTION: Final = "nothing was published, please report this"
_OF_FLOAT32: Final = ("accuracy_level",)  # attributes


def check_twin(graph: Path, twin: Path) -> None:
    """Compare the nodes and the stored tensors of two graphs, one tensor at a time.

    Args:
        graph: in float16 or bfloat16.
        twin: in float32.

    Raises:
        AgreementError: another node, a number that is not the twin's rounded to its type, an integer that is not the twin's, or a
            number that is too large for its type.
    """
    own, other = (_graph(path) for path in (graph, twin))
    for node, expected in zip_longest(_nodes(own), _nodes(other)):
        if node != expected:
            raise AgreementError(f"{graph} has the node {node}, where its float32 twin has {expected}; {_ACTION}")
    if odd := sorted(own.initializers.keys() ^ other.initializers.keys()):
        raise AgreementError(f"{graph} and its float32 twin do not both have {', '.join(odd[:5])}; {_ACTION}")
    for name, value in own.initializers.items():
        found, expected = (held.const_value.numpy() for held in (value, other.initializers[name]))
        with np.errstate(over="ignore"):
            rounded = expected.astype(found.dtype)
        if found.shape != rounded.shape or not np.array_equal(_bytes(found), _bytes(rounded)):
            raise AgreementError(f"{graph}: {name} is not its float32 twin's, rounded to {found.dtype}; {_ACTION}")
        if not np.isfinite(found).all():
            raise AgreementError(
                f"{graph}: {name} has a number that is too large for {found.dtype}; nothing was published, set another "
                "engine.onnx_dtype"
            )


def _graph(path: Path) -> Any:
    import onnx_ir

    return onnx_ir.load(path).graph  # tensors stay in their file until they are asked for


def _nodes(graph: Any) -> list[tuple[Any, ...]]:
    """Describe all nodes but those that convert floating point numbers."""
    return [
        (node.domain, node.op_type, node.name, {k: v.value for k, v in node.attributes.items() if k not in _OF_FLOAT32})
        for node in graph
        if not (node.op_type == "Cast" and node.attributes["to"].value in _float_types())
    ]


def _float_types() -> set[int]:
    import onnx_ir

    return {int(onnx_ir.DataType[name]) for name in FLOATS}


def _bytes(values: Any) -> Any:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
