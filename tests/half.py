"""Bfloat16 graphs on the CPU, where no kernel multiplies in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def runnable(graph: Path) -> Path:
    """A bfloat16 graph whose nodes compute in float32: what they read is converted, and their results are rounded again."""
    import onnx

    half, single = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    model = onnx.load(graph, load_external_data=False)
    rounded = {value.name for value in model.graph.input if value.type.tensor_type.elem_type == half}
    rounded |= {tensor.name for tensor in model.graph.initializer if tensor.data_type == half}
    nodes: list[Any] = []
    for number, node in enumerate(list(model.graph.node)):
        if node.op_type == "Cast":
            rounded |= {node.output[0]} if node.attribute[0].i == half else set()
            nodes.append(node)
        elif rounded.isdisjoint(node.input):
            nodes.append(node)
        else:
            rounded |= set(filter(None, node.output))
            for place, name in enumerate(node.input):
                if name in rounded:
                    node.input[place] = f"{name}.{number}.{place}.single"
                    nodes.append(onnx.helper.make_node("Cast", [name], [node.input[place]], to=single))
            after = [(name, f"{name}.single") for name in node.output if name]
            for place, name in enumerate(node.output):
                node.output[place] = f"{name}.single" if name else ""
            nodes += [node, *(onnx.helper.make_node("Cast", [wide], [name], to=half) for name, wide in after)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, graph.with_name("runnable.onnx"))
    return graph.with_name("runnable.onnx")
