"""The compressed layers in torch: factors, rounded weights, and residuals beside them.

y = B z + b, with z = A x or, for an identity block, z = x_J + T x_Jc (docs/methods.md, "Structures"); or y = Q x + B A x + b with a
rounded weight Q and a residual B A. The members of a fused group share what makes z, which stands once in the model under the
group's name; each member keeps its own rows of B and b. Names in the state dict are those of docs/format.md.

A rounded weight stays what it is on disk. It is dequantized for each multiplication, which takes time but no memory: this is what
the engines are held against, not what serves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from lrserve.compression.dense_weight import DenseWeight
from lrserve.compression.groups import Stored
from lrserve.compression.level import SCHEMES, Precision
from lrserve.compression.packing import dequantize, pack_int4, unpack_int4
from lrserve.compression.quantize import Residual, Rounded, inputs_in_units
from lrserve.compression.spec import GroupSpec, weight_tensors


class KeepsDtypes(nn.Module):
    """A module whose tensors named in `exact` keep their dtype when the model is cast: float32 scales, and 8-bit floats."""

    exact: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        kept = [getattr(self, name) for name in self.exact]

        def apply(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            keep = moved.dtype != tensor.dtype and any(tensor is own for own in kept)
            return tensor.to(moved.device) if keep else moved

        return super()._apply(apply, recurse)  # type: ignore[no-untyped-call]


def exact_names(model: nn.Module) -> set[str]:
    """Name the floating-point tensors whose dtype belongs to a rounded weight, and is not the dtype that the model computes in."""
    owners = ((name, module) for name, module in model.named_modules() if isinstance(module, KeepsDtypes))
    return {f"{name}.{tensor}" if name else tensor for name, module in owners for tensor in module.exact}


class Matrix(KeepsDtypes):
    """W (m, n), floating point numbers or, where `weights` says to what, rounded, under docs/format.md's names."""

    weights: Precision | None
    in_features: int
    out_features: int
    weight: torch.Tensor
    weight_packed: torch.Tensor
    weight_scale: torch.Tensor
    weight_shape: torch.Tensor

    def _hold(self, n: int, m: int, weights: Precision | None, dtype: torch.dtype | None, device: Any) -> None:
        """Make the tensors, uninitialised, in the place of those that were there. Integers are buffers, scales can be trained."""
        for name in ("weight", "weight_packed", "weight_scale", "weight_shape"):
            if name in self._parameters or name in self._buffers:
                delattr(self, name)
        self.in_features, self.out_features, self.weights = n, m, weights
        for name, (shape, own) in weight_tensors(m, n, weights).items():
            tensor = torch.empty(shape, dtype=own or dtype, device=device)
            if own in (None, torch.float32):
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self.exact = ("weight", "weight_scale") if weights and SCHEMES[weights].group is None else ()

    @torch.no_grad()
    def put(self, rounded: Rounded) -> None:
        """Take a rounded weight (m, n) in the place of the weight."""
        tensor = self._weight_tensor
        m, n = rounded.values.shape
        self._hold(n, m, rounded.precision, tensor.dtype if tensor.is_floating_point() else None, tensor.device)
        self.weight_scale.copy_(rounded.scales)
        if rounded.scheme.group is None:
            self._buffers["weight"] = rounded.values.to(tensor.device, copy=True)
        else:
            self.weight_packed.copy_(pack_int4(rounded.values))
            self.weight_shape.copy_(torch.tensor([m, n]))

    @torch.no_grad()
    def put_dense(self, weight: torch.Tensor) -> None:
        """Take a weight (m, n) that is not rounded in the place of the weight."""
        m, n = weight.shape
        self._hold(n, m, None, weight.dtype, weight.device)
        self.weight.copy_(weight)

    @property
    def _weight_tensor(self) -> torch.Tensor:
        """A tensor of the weight: of its device, and if there is one of the dtype that the model computes in."""
        tensor: torch.Tensor = getattr(self, "weight_scale" if self.weights in ("int4_g32", "int4_g64", "int4_g128") else "weight")
        return tensor

    def row_tensors(self) -> list[torch.Tensor]:
        """Return the tensors that have a row for each output."""
        names = (name for name in weight_tensors(self.out_features, self.in_features, self.weights) if name != "weight_shape")
        return [*(getattr(self, name).data for name in names), *([] if getattr(self, "bias", None) is None else [self.bias.data])]

    def dense(self) -> torch.Tensor:
        """Return W (m, n); float32 where it is rounded."""
        if self.weights is None:
            return self.weight
        scheme, scales = SCHEMES[self.weights], self.weight_scale.float()
        values = self.weight if scheme.group is None else unpack_int4(self.weight_packed)
        values = values.float() if scheme.floating else values  # integers are what the scales' gradient keeps: one byte each
        return dequantize(values, scales)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply x (..., n) -> (..., m), its values rounded first where the engines do so: in 16 bits, not in float32."""
        if self.weights is None:
            return linear(x, self.weight, bias)
        scheme = SCHEMES[self.weights]
        if not scheme.rounds_inputs or x.dtype.itemsize > 2:
            return linear(x, self.dense().to(x.dtype), bias)
        near, token = inputs_in_units(x, scheme)
        # Both sides are exact in 16 bits. Their product overflows float16.
        work = torch.float32 if x.dtype == torch.float16 else x.dtype
        y = (linear(near.to(work), self.weight.to(work)) * (token * self.weight_scale.float().T)).to(x.dtype)
        return y if bias is None else y + bias


class Factor(Matrix):
    """y = W x + b, x (..., n), y (..., m): W (m, n) and, if wanted, `bias` (m,), uninitialised.

    Not an `nn.Linear`: tools that look for linear layers, such as PEFT's `target_modules="all-linear"`, must find the compressed
    layer and not its factors.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        n: int,
        m: int,
        *,
        bias: bool,
        weights: Precision | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self._hold(n, m, weights, dtype, device)
        self.register_parameter("bias", nn.Parameter(torch.empty(m, dtype=dtype, device=device)) if bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x (..., n) -> (..., m)."""
        return self.multiply(x, self.bias)


class IdentityBlock(Matrix):
    """z = x_J + T x_Jc, x (..., n), z (..., r): the weight is T (r, n - r), `order` (n,) int32 names J's inputs and then Jc's.

    `order` is None where the inputs arrive in that order. `in_features` are T's.
    """

    order: torch.Tensor | None

    def __init__(
        self,
        n: int,
        rank: int,
        ordered: bool,
        weights: Precision | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.rank = rank
        self._hold(n - rank, rank, weights, dtype, device)
        self.register_buffer("order", None if ordered else torch.empty(n, dtype=torch.int32, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Reorder x (..., n) if need be, then interpolate -> (..., r)."""
        x = x if self.order is None else x.index_select(-1, self.order)
        pivots, others = x.split_with_sizes([self.rank, self.in_features], -1)
        return pivots + self.multiply(others)


def first_factor(spec: GroupSpec, n: int, dtype: torch.dtype | None = None, device: Any = None) -> Factor | IdentityBlock:
    """Build what makes z (..., r) of x (..., n), uninitialised."""
    if spec.structure == "identity_block":
        return IdentityBlock(n, spec.rank, spec.ordered, spec.weights, dtype=dtype, device=device)
    return Factor(n, spec.rank, bias=False, weights=spec.weights, dtype=dtype, device=device)


class FirstFactor(nn.Module):
    """Holder of the A that the members of a fused group share."""

    def __init__(self, A: Factor | IdentityBlock) -> None:
        super().__init__()
        self.A = A


class ResidualFactor(KeepsDtypes):
    """One factor of a residual, int8: A (r, n) with a scale for each rank, or B (m, r) without."""

    def __init__(self, n: int, m: int, *, scaled: bool, device: Any = None) -> None:
        super().__init__()
        self.in_features, self.out_features = n, m
        self.weight: torch.Tensor
        self.register_buffer("weight", torch.empty(m, n, dtype=torch.int8, device=device))
        if scaled:
            self.weight_scale = nn.Parameter(torch.empty(m, 1, dtype=torch.float32, device=device))
            self.exact = ("weight_scale",)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x (..., n) -> (..., m), in the dtype of x."""
        W = self.weight.float() * self.weight_scale if self.exact else self.weight
        return linear(x, W.to(x.dtype))


class SharedResidual(nn.Module):
    """Holder of the residual's A that the members of a fused group share."""

    def __init__(self, A: ResidualFactor) -> None:
        super().__init__()
        self.residual_A = A


class Repaired(nn.Module):
    """A layer that may have a residual B A beside its rounded weight. A may be borrowed from a `SharedResidual`."""

    residual: int = 0
    """Its rank."""
    residual_A: ResidualFactor  # noqa: N815 - the format's names
    residual_B: ResidualFactor  # noqa: N815
    _residual: tuple[SharedResidual, ...] = ()

    def add_residual(self, A: ResidualFactor | SharedResidual, m: int) -> None:
        """Add a residual with this A (r, n) and an uninitialised B (m, r), in the place of one that was there."""
        shared = isinstance(A, SharedResidual)
        first = A.residual_A if isinstance(A, SharedResidual) else A
        self._residual = (A,) if isinstance(A, SharedResidual) else ()
        if not shared:
            self.residual_A = first
        self.residual = first.out_features
        self.residual_B = ResidualFactor(self.residual, m, scaled=False, device=first.weight.device)

    def drop_residual(self) -> None:
        """Take the residual away, if there is one."""
        if self.residual:
            self.residual, self._residual = 0, ()
            del self.residual_B
            if hasattr(self, "residual_A"):
                del self.residual_A

    @property
    def residual_first(self) -> ResidualFactor | None:
        """The A of the residual, borrowed or owned."""
        if not self.residual:
            return None
        return self._residual[0].residual_A if self._residual else self.residual_A

    def repaired(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Add what the residual makes of x (..., n) to y (..., m), if there is one."""
        first = self.residual_first
        return y if first is None else y + self.residual_B(first(x))

    def put_residual(self, residual: Residual, rows: slice) -> None:
        """Copy A, its scales and the rows of B that are this layer's."""
        first = self.residual_first
        if first is None:
            raise TypeError("the layer has no residual")
        with torch.no_grad():
            first.weight.copy_(residual.A)
            first.weight_scale.copy_(residual.scales[:, None])
            self.residual_B.weight.copy_(residual.B[rows])


class RoundedLinear(Matrix, Repaired, nn.Linear):
    """y = Q x + b, x (..., n), y (..., m), with a rounded weight Q (m, n), and the residual beside it.

    An `nn.Linear` to tools that adapt linear layers (PEFT); `groups.is_dense` tells it from a dense one. The weight's tensors have
    the names of docs/format.md; where none of them is `weight`, that is computed when somebody reads it.
    """

    def __init__(
        self, n: int, m: int, weights: Precision, *, bias: bool, dtype: torch.dtype | None = None, device: Any = None
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which makes a dense weight
        self._hold(n, m, weights, dtype, device)
        self.register_parameter("bias", nn.Parameter(torch.empty(m, dtype=dtype, device=device)) if bias else None)

    @classmethod
    def of(cls, dense: nn.Linear, weights: Precision, outputs: int | None = None) -> RoundedLinear:
        """Build what takes a dense linear's place, or with so many `outputs`: uninitialised, but with the bias of that linear."""
        weight, m = dense.weight, outputs or dense.out_features
        keep = dense.bias is not None and m == dense.out_features
        biased = dense.bias is not None
        layer = cls(dense.in_features, m, weights, bias=biased and not keep, dtype=weight.dtype, device=weight.device)
        if keep:
            layer.bias = dense.bias
        return layer

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.weights and SCHEMES[self.weights].group:
            scale = self.weight_scale
            return DenseWeight((self.out_features, self.in_features), scale, lambda: self.dense().to(scale.dtype))
        return super().__getattr__(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x (..., n) -> (..., m)."""
        return self.repaired(x, self.multiply(x, self.bias))

    def extra_repr(self) -> str:
        """Shapes, for `print(model)`."""
        residual = f", residual={self.residual}" if self.residual else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, weights={self.weights}{residual}"


class LowRankLinear(Repaired, nn.Linear):
    """y = B z + b, x (..., n), y (..., m): a linear layer whose weight is computed from its factors when somebody reads it.

    `A`, which makes z of x, is None where x arrives as z: fewer inputs than the dense layer has. It may belong to a `FirstFactor`
    and only be borrowed here, so that it is stored, moved and counted once; otherwise the layer owns it. Sharing is of the weight:
    each member computes z by itself, since the models' own code calls q, k and v one by one. The serving engine computes it once.
    `weights`: what A, or T, and B are rounded to.

    An `nn.Linear` to tools that adapt linear layers (PEFT); `groups.is_dense` tells it from a dense one.
    """

    A: Factor | IdentityBlock | None

    def __init__(
        self,
        m: int,
        rank: int,
        A: Factor | IdentityBlock | FirstFactor | None,
        dtype: torch.dtype | None = None,
        device: Any = None,
        weights: Precision | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which makes a dense weight
        self.out_features, self.rank = m, rank
        self._shared = (A,) if isinstance(A, FirstFactor) else None  # a tuple, so that torch does not register it twice
        if not isinstance(A, FirstFactor):
            self.A = A
        self.B = Factor(rank, m, bias=True, weights=weights, dtype=dtype, device=device)
        first = self.first
        self.in_features = rank if first is None else first.in_features + (rank if isinstance(first, IdentityBlock) else 0)

    @property
    def first(self) -> Factor | IdentityBlock | None:
        """What makes z of x, borrowed or owned; None where nothing has to be made."""
        return self._shared[0].A if self._shared is not None else self.A

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The dense weight (m, n) that the factors stand for, to read; B's own where B is all, and not rounded."""
        if self.first is None and self.B.weights is None:
            return self.B.weight
        return DenseWeight((self.out_features, self.in_features), self.bias, self._product)

    @property
    def bias(self) -> nn.Parameter:  # type: ignore[override]
        """B's bias (m,)."""
        return self.B.get_parameter("bias")

    @torch.no_grad()
    def _product(self) -> torch.Tensor:
        B, first = self.B.dense().to(self.bias.dtype), self.first
        if first is None:
            return B
        product = B @ first.dense().to(B.dtype)
        if not isinstance(first, IdentityBlock):
            return product
        W = torch.cat([B, product], dim=1)
        return W if first.order is None else torch.empty_like(W).index_copy_(1, first.order.long(), W)

    @property
    def shares(self) -> bool:
        """Whether what makes z of x is borrowed, from the group that other linears are members of."""
        return self._shared is not None

    @property
    def weights(self) -> Precision | None:
        """What the factors are rounded to."""
        return self.B.weights

    @property
    def structure(self) -> Stored:
        """What the factors are stored as."""
        if self.first is None:
            return "narrow_in"
        return "identity_block" if isinstance(self.first, IdentityBlock) else "low_rank"

    @property
    def ordered(self) -> bool:
        """Whether this is an identity block whose inputs arrive as J and then Jc."""
        return isinstance(self.first, IdentityBlock) and self.first.order is None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply by both factors: x (..., n) -> (..., m)."""
        return self.repaired(x, self.B(x if self.first is None else self.first(x)))

    def extra_repr(self) -> str:
        """Shapes, for `print(model)`."""
        return f"out_features={self.out_features}, rank={self.rank}, structure={self.structure}"
