"""Nodes and weights of an ONNX graph in the making, and what a plan makes of a linear layer.

A graph computes in one number format, float32, float16 or bfloat16, in which its floating point numbers are stored too.

A weight that is not rounded is stored transposed, (in, out), as MatMul reads it. A rounded one is a MatMulNBits: its integers in
blocks of neighbouring inputs with a scale each, plus 8 or 128 as that operator has them. The factors of a fused group are
one product by A and one by B; an identity block's z = x_J + T x_Jc is a Gather by `order` (unless x is ordered), a Split, the
product by T and an Add; a residual is two products beside a rounded weight and an Add.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import numpy as np
import torch
from torch import nn

from lrserve.compression.embedding import RoundedEmbedding
from lrserve.compression.groups import is_dense
from lrserve.compression.layers import Factor, IdentityBlock, LowRankLinear, Matrix, ResidualFactor, RoundedLinear
from lrserve.compression.level import SCHEMES
from lrserve.compression.quantize import inputs_in_units
from lrserve.errors import UnsupportedModelError
from lrserve.recipe import Dtype

OPSET: Final = 23  # the first with RMSNormalization
IR_VERSION: Final = 10  # onnx writes newer ones by default than ONNX Runtime reads
MICROSOFT: Final = "com.microsoft"
ACCURACY: Final = 4  # accuracy_level of MatMulNBits in float32: inputs are rounded to 8 bits, in blocks like the weight's
_BLOCKS: Final = (128, 64, 32)  # sizes of blocks where a scheme has one scale a row
_SMALLEST_BLOCK: Final = 16  # of MatMulNBits
_RESIDUAL_SHIFT: Final = 2.0**10
"""What a residual's A is multiplied by, and B divided by: float16 has room for the scales, and for what is between the two."""
FLOATS: Final = {"FLOAT": torch.float32, "FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16}
"""Number formats of graphs, by ONNX's names."""

Transform = Callable[[torch.Tensor], torch.Tensor]
Linear: TypeAlias = "nn.Linear | Matrix | ResidualFactor"


def build_layer(layer: nn.Module, n: int, dtype: Dtype = "float32") -> Any:
    """Render one linear, dense or compressed, as an `onnx_ir.Model` of its own, x (B, S, n) -> y (B, S, m), in this format.

    Raises:
        UnsupportedModelError: a layer that `onnx_graph.build_graph` would not render either.
    """
    nodes = Nodes(layer, dtype)
    x = nodes.value("x", ["batch_size", "sequence_length", n])
    y = nodes.linear(x, layer, "layer")
    y.name, y.type = "y", x.type
    return nodes.finish([x], [y])


def save_graph(graph: Any, path: Path) -> None:
    """Write `graph` to `path`, and its weights to `<name>_data` beside it: the name that transformers.js looks for."""
    import onnx_ir as ir

    ir.save(graph, path, external_data=f"{path.name}_data", size_threshold_bytes=1024)


def save_beside(graph: Any, path: Path, other: Path) -> None:
    """Write `graph` to `path`, with the weights of another saved graph of the same folder instead of weights of its own."""
    import onnx_ir as ir

    stored = ir.load(other).graph.initializers
    for name, value in graph.graph.initializers.items():
        if name in stored:
            value.const_value = stored[name].const_value
    ir.save(graph, path)


def side_by_side(modules: Sequence[nn.Module]) -> bool:
    """Say whether linears of the same input can be one product, whose outputs are theirs one after the other."""
    first = modules[0]
    if isinstance(first, RoundedLinear):
        alike = (RoundedLinear, first.weights, first.residual_first)
        return all((type(m), getattr(m, "weights", None), getattr(m, "residual_first", None)) == alike for m in modules)
    if isinstance(first, LowRankLinear):
        return all(isinstance(m, LowRankLinear) and m.first is first.first and m.weights == first.weights for m in modules)
    return all(map(is_dense, modules))


@contextmanager
def rounding_inputs(model: nn.Module) -> Iterator[None]:
    """Let a compressed model round what it multiplies by rounded weights, as the graph's products do it.

    Of an identity block all of the inputs are rounded here, and in the graph those that T multiplies.
    """

    def rounds(matrix: Matrix | ResidualFactor) -> Callable[[Any, tuple[torch.Tensor, ...]], tuple[torch.Tensor]]:
        size = _block_size(matrix)

        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            x = inputs[0]
            blocks = nn.functional.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
            near, scale = inputs_in_units(blocks, SCHEMES["int8"])
            return ((near * scale).flatten(-2)[..., : x.shape[-1]].to(x.dtype),)

        return hook

    matrices = [
        m
        for m in model.modules()
        if isinstance(m, (Matrix, ResidualFactor)) and not isinstance(m, RoundedEmbedding) and _bits(m) is not None
    ]
    handles = [matrix.register_forward_pre_hook(rounds(matrix)) for matrix in matrices]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Nodes:
    """Nodes and initializers of one graph, and linear layers; values are of type `real`, ONNX's name of the graph's format."""

    def __init__(self, module: nn.Module, dtype: Dtype = "float32") -> None:
        import onnx_ir

        self.ir: Any = onnx_ir
        self.real = next(name for name, own in FLOATS.items() if own == getattr(torch, dtype))
        self.parameters = {id(parameter): name for name, parameter in module.named_parameters()}
        self.read: set[int] = set()  # of those
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.shared_inputs: dict[tuple[int, str], Any] = {}  # (A, input) -> z, which the members of a group share

    def finish(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
        """Return the graph as an `onnx_ir.Model`."""
        graph = self.ir.Graph(
            inputs,
            outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": OPSET, MICROSOFT: 1},
            name="lrserve",
        )
        return self.ir.Model(graph, ir_version=IR_VERSION, producer_name="lrserve")

    # -- values and nodes ---------------------------------------------------------------------------------------------

    def value(self, name: str, shape: Sequence[int | str] | None = None, dtype: str | None = None) -> Any:
        """Make a value without a node."""
        tensor_type = self.ir.TensorType(self.ir.DataType[dtype or self.real])
        return self.ir.Value(name=name, shape=None if shape is None else self.ir.Shape(shape), type=tensor_type)

    def node(
        self,
        operator: str,
        inputs: Sequence[Any],
        name: str,
        *,
        domain: str = "",
        outputs: Sequence[Any] | None = None,
        **attributes: Any,
    ) -> Any:
        """Append a node, of one output named after it unless `outputs` are given, and return its first output."""
        outputs = outputs or [self.ir.Value(name=name)]
        self.nodes.append(self.ir.node(operator, inputs, attributes, domain=domain, outputs=outputs, name=name))
        return outputs[0]

    def cast(self, x: Any, name: str, dtype: str) -> Any:
        """Convert x between float32 and `real`, where these are two."""
        return x if self.real == "FLOAT" else self.node("Cast", [x], name, to=int(self.ir.DataType[dtype]))

    def initializer(self, tensor: Any) -> Any:
        """Make a value of a tensor."""
        value = self.ir.Value(name=tensor.name, shape=tensor.shape, type=self.ir.TensorType(tensor.dtype), const_value=tensor)
        self.initializers[tensor.name] = value
        return value

    def constant(self, name: str, number: Any, dtype: Any) -> Any:
        """Make a small initializer, once."""
        if name in self.initializers:
            return self.initializers[name]
        return self.initializer(self.ir.tensor(np.array(number, dtype=dtype), name=name))

    def lazy(self, name: str, shape: Sequence[int], compute: Callable[[], torch.Tensor], dtype: str | None = None) -> Any:
        """Make an initializer, once, whose values exist only while they are being written; floats are rounded to its type."""
        if name in self.initializers:
            return self.initializers[name]
        dtype = dtype or self.real

        def materialise() -> Any:
            with torch.no_grad():
                tensor = compute().cpu()
                return self.ir.tensor(tensor.to(FLOATS.get(dtype, tensor.dtype)).contiguous(), name=name)

        return self.initializer(self.ir.LazyTensor(materialise, self.ir.DataType[dtype], self.ir.Shape(shape), name=name))

    def number(self, name: str, number: float) -> Any:
        """Make an initializer of one number, once."""
        return self.lazy(name, [], lambda: torch.tensor(number))

    def name_of(self, parameter: torch.Tensor, where: str) -> str:
        """Return a parameter's name, and note that the graph reads it.

        Raises:
            UnsupportedModelError: `where` keeps something else than a parameter there (a hook, a parametrization).
        """
        name = self.parameters.get(id(parameter))
        if name is None:
            raise UnsupportedModelError(
                f"{where}: its weight is not a parameter of the model; merge adapters and parametrizations first"
            )
        self.read.add(id(parameter))
        return name

    def weight(self, parameter: torch.Tensor, where: str, transform: Transform | None = None, dtype: str | None = None) -> Any:
        """Make an initializer from a parameter of the model, under the parameter's own name."""
        name = self.name_of(parameter, where)
        transform = transform or (lambda tensor: tensor)
        shape = transform(torch.empty(parameter.shape, device="meta")).shape
        return self.lazy(name, shape, lambda: transform(parameter.detach().float()), dtype)

    # -- linear layers ------------------------------------------------------------------------------------------------

    def linear(self, x: Any, module: nn.Module, where: str) -> Any:
        """Multiply by one linear; members of a fused group share one z."""
        return self.linears(x, [module], where)

    def linears(self, x: Any, modules: Sequence[nn.Module], where: str) -> Any:
        """Multiply by linears that are `side_by_side`, in one product.

        Raises:
            UnsupportedModelError: a layer that is none of lrserve's and no dense linear.
        """
        first = modules[0]
        if isinstance(first, LowRankLinear):
            z = x if first.first is None else self.shared(x, first.first, where)
            y = self.product(z, [cast(Factor, module.B) for module in modules], f"{where}.B")
        elif isinstance(first, RoundedLinear) or is_dense(first):
            y = self.product(x, cast("Sequence[Linear]", modules), where)
        else:
            raise UnsupportedModelError(
                f"{where}: the ONNX graph renders dense linears and those that lrserve compressed, this is a "
                f"{type(first).__name__}; merge adapters first"
            )
        A = getattr(first, "residual_first", None)
        if A is None:
            return y
        second = [cast(ResidualFactor, module.residual_B) for module in modules]
        repair = self.product(self.shared(x, A, where), second, f"{where}.residual_B")
        return self.node("Add", [y, repair], f"{where}.repaired")

    def shared(self, x: Any, first: Factor | IdentityBlock | ResidualFactor, where: str) -> Any:
        """Multiply by a first factor, once for each input."""
        key = (id(first), x.name)
        if key not in self.shared_inputs:
            parameter = next(first.parameters())
            where = self.name_of(parameter, where).rpartition(".")[0]
            if isinstance(first, IdentityBlock):
                self.shared_inputs[key] = self.interpolate(x, first, where)
            else:
                self.shared_inputs[key] = self.product(x, [first], where)
        return self.shared_inputs[key]

    def interpolate(self, x: Any, block: IdentityBlock, where: str) -> Any:
        """Return x_J + T x_Jc: (B, S, n) -> (B, S, r)."""
        widths = [block.rank, block.in_features]
        if block.order is not None:
            order = self.constant(f"{where}.order", block.order.cpu().numpy(), np.int32)
            x = self.node("Gather", [x, order], f"{where}.Gather", axis=-1)
        sizes = self.constant(f"split.{widths[0]}.{widths[1]}", widths, np.int64)
        pivots, others = (self.ir.Value(name=f"{where}.{part}") for part in ("pivots", "others"))
        self.node("Split", [x, sizes], f"{where}.Split", outputs=[pivots, others], axis=-1)
        return self.node("Add", [self.product(others, [block], where), pivots], f"{where}.Add")

    def product(self, x: Any, matrices: Sequence[Linear], where: str) -> Any:
        """Multiply by matrices of one kind, and add their biases: x (B, S, n) -> (B, S, m), the rows of all of them."""
        if len(matrices) == 1 and (parameter := next(matrices[0].parameters(recurse=False), None)) is not None:
            where = self.name_of(parameter, where).rpartition(".")[0]
        multiply = self.matmul if _bits(matrices[0]) is None else self.matmul_blocks
        y = multiply(x, matrices, where)
        biases = [getattr(matrix, "bias", None) for matrix in matrices]
        for bias in biases:
            if bias is not None:
                self.name_of(bias, where)

        def stacked() -> torch.Tensor:
            rows = [matrix.out_features for matrix in matrices]
            return torch.cat([torch.zeros(m) if b is None else b.detach().float().cpu() for m, b in zip(rows, biases, strict=True)])

        if all(bias is None for bias in biases):
            return y
        return self.node("Add", [y, self.lazy(f"{where}.bias", [_rows(matrices)], stacked)], f"{where}.Add")

    def matmul(self, x: Any, matrices: Sequence[Linear], where: str) -> Any:
        """Multiply by weights (m, n) as floating point numbers."""
        for matrix in matrices:
            self.name_of(_parameter(matrix), where)

        def transposed() -> torch.Tensor:
            return torch.cat([_dense(matrix).detach() for matrix in matrices]).t()

        shape = [matrices[0].in_features, _rows(matrices)]
        return self.node("MatMul", [x, self.lazy(f"{where}.weight", shape, transposed)], f"{where}.MatMul")

    def matmul_blocks(self, x: Any, matrices: Sequence[Linear], where: str) -> Any:
        """Multiply by rounded weights (m, n), in blocks."""
        sizes = {"K": matrices[0].in_features, "N": _rows(matrices), **_layout(matrices[0])}
        if self.real == "FLOAT":  # kernels of GPUs know no accuracy_level
            sizes["accuracy_level"] = ACCURACY
        inputs = [x, *self.blocks(matrices, where)]
        return self.node("MatMulNBits", inputs, f"{where}.MatMulNBits", domain=MICROSOFT, **sizes)

    def blocks(self, matrices: Sequence[Linear], where: str) -> list[Any]:
        """Return the integers (m, blocks, bytes) of rounded weights, and the scales (m, blocks)."""
        size, bits = _layout(matrices[0]).values()
        m, count = _rows(matrices), -(-matrices[0].in_features // size)
        for matrix in matrices:
            if (scale := _own_scale(matrix)) is not None:
                self.name_of(scale, where)

        def values() -> torch.Tensor:
            return torch.cat([_blocks(matrix, size) for matrix in matrices])

        def scales() -> torch.Tensor:
            return torch.cat([_scales(matrix, count) for matrix in matrices])

        stored = self.lazy(f"{where}.weight", [m, count, size * bits // 8], values, "UINT8")
        return [stored, self.lazy(f"{where}.weight_scale", [m, count], scales)]

    def rows(self, ids: Any, embedding: RoundedEmbedding, where: str) -> Any:
        """Look rows of a rounded weight up: ids (B, S) -> (B, S, n)."""
        values, scales = self.blocks([embedding], where)
        shape = self.constant(f"{where}.shape", [embedding.out_features, -1], np.int64)
        flat = self.node("Reshape", [values, shape], f"{where}.Reshape")  # ONNX Runtime does it once, when it loads the graph
        sizes = {"gather_axis": 0, "quantize_axis": 1, **_layout(embedding)}
        return self.node("GatherBlockQuantized", [flat, ids, scales], where, domain=MICROSOFT, **sizes)


def _block_size(matrix: Linear) -> int:
    """Return how many neighbouring inputs share a scale in the graph: as many as in the scheme, or a number that divides them."""
    group = SCHEMES[matrix.weights].group if isinstance(matrix, Matrix) and matrix.weights else None
    return group or next((size for size in _BLOCKS if matrix.in_features % size == 0), _SMALLEST_BLOCK)


def _layout(matrix: Linear) -> dict[str, Any]:
    """Return a rounded weight's block size and bits, as attributes of ONNX Runtime's operators."""
    return {"block_size": _block_size(matrix), "bits": _bits(matrix)}


def _rows(matrices: Sequence[Linear]) -> int:
    return sum(matrix.out_features for matrix in matrices)


def _bits(matrix: Linear) -> int | None:
    """Return the bits of integers that MatMulNBits multiplies by; None for floating point numbers, those of 8 bits too."""
    if isinstance(matrix, ResidualFactor):
        return 8
    weights = getattr(matrix, "weights", None)
    return None if weights is None or SCHEMES[weights].floating else SCHEMES[weights].bits


def _parameter(matrix: Linear) -> torch.Tensor:
    """Return the parameter that stands for a weight that is stored as floating point numbers."""
    scale = _own_scale(matrix)
    return matrix.weight if scale is None else scale


def _own_scale(matrix: Linear) -> torch.Tensor | None:
    """Return a rounded weight's scales (m, groups); None where there are none."""
    return cast("torch.Tensor | None", getattr(matrix, "weight_scale", None))


def _dense(matrix: Linear) -> torch.Tensor:
    return matrix.dense() if isinstance(matrix, Matrix) else matrix.weight


def _blocks(matrix: Linear, size: int) -> torch.Tensor:
    """Return a rounded weight's integers as MatMulNBits has them: bytes (m, blocks, size * bits / 8), the last block filled up."""
    if isinstance(matrix, Matrix) and _bits(matrix) == 4:  # docs/format.md's order of eight integers is that of their bytes
        return matrix.weight_packed.cpu().contiguous().view(torch.uint8).view(matrix.out_features, -1, size // 2)
    values = (matrix.weight.cpu().to(torch.int16) + 128).to(torch.uint8)
    return nn.functional.pad(values, (0, -values.shape[1] % size), value=128).view(len(values), -1, size)


def _scales(matrix: Linear, blocks: int) -> torch.Tensor:
    """Return the scale (m, blocks) of each block."""
    scale = _own_scale(matrix)
    if scale is None:  # a residual's B
        return torch.full((matrix.out_features, blocks), 1 / _RESIDUAL_SHIFT)
    shift = _RESIDUAL_SHIFT if isinstance(matrix, ResidualFactor) else 1.0
    return scale.detach().float().cpu().expand(-1, blocks) * shift
