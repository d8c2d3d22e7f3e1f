"""The compressed layers inside vLLM: y = B z + b, two matrix multiplications per fused group. Imports vLLM.

z = A x or, for an identity block, z = x_J + T x_Jc; where an MLP has lost neurons, z = x, and there is one multiplication. For the
members of a fused group (q, k, v; gate, up) z is shared and the rows of B are stacked, so the group costs two multiplications
however many members it has, with the bias in the second one's epilogue. Rounded weights are loaded and multiplied by vLLM's own
schemes (schemes.py), those of linears without factors in vLLM's own layer (`StockMethod`), and a residual is two multiplications
more for each fused group. Fused layers whose linears have factors each of their own are in apart.py.

Tensor parallel, following vLLM's slicing of the dense layer:
- column-parallel: A (r, n), or T and `order`, on every rank; of B and b each rank takes its rows of each member (key and
  value heads are replicated where there are fewer of them than ranks).
- row-parallel: each rank takes its columns of A, and the partial A x (r wide, not m wide) is summed over the ranks.
  With LoRA the sum has to come after the output, where LoRA adds its own partial product. A rank that sees a stretch of x
  sees only some of an identity block's J and Jc: there its columns of [I T], put back into the order of the inputs, are
  made into an A while loading. That is the same map, at the cost of two factors (r n of T's r (n - r) values and r^2 more).
  So are those of a linear alone in a fused layer, whose rows stand between the others'.
- MLPs with fewer neurons: each rank takes its share of those that are left, as vLLM does with all of them.
- rounded weights: as above, in whole groups of inputs. A part of [I T] is not made of integers, so an identity block that is
  rounded cannot be divided among the ranks of a row-parallel layer.
- residuals: each rank has its columns of A and its rows of B, as of the weight beside them. The outputs are summed as they are.

vLLM does not notice a quantized parameter that no tensor was loaded into, so loading.py counts what arrives.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from lrserve.compression.spec import GroupSpec, check_groups
from lrserve.plugins.vllm.kernels import Factor, Residual, first_factor
from lrserve.plugins.vllm.loading import (
    Loading,
    LoadingResidual,
    LoadingStock,
    check_columns,
    check_identity_block,
    check_members,
    columns_of,
    is_dummy,
    require_complete,
    rows_of_members,
    share_of_neurons,
)
from lrserve.plugins.vllm.schemes import create_weights, linear_method, scheme_for

_REORDERED = (
    "this lrserve artifact has fewer neurons in its MLPs than the dense model, or keeps them in another order: LoRA adapters of "
    "gate_proj, up_proj or down_proj do not fit unless they were trained on the artifact; those of the attention are not affected. "
    "To serve such adapters, compress with factorization.structure: low_rank"
)


class LowRankLinearMethod(LinearMethodBase):
    """What vLLM asks of one factorized layer: its parameters, what to do once they are loaded, and the multiplication."""

    def __init__(self, prefix: str, spec: GroupSpec) -> None:
        self.prefix, self.spec = prefix, spec
        self._loading: Loading | None = None
        self._residual: Residual | None = None
        self._loading_residual: LoadingResidual | None = None
        self._dummy = False
        self._reduce_inside = False  # sum over the ranks between A and B
        self._first_rank_only = False  # the output is summed over the ranks later: b may be added once
        self._materialised = False  # A is made of a part of [I T]

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Hang the factors into the layer as `layer.A` (r, n) or (r, n - r) and `layer.B` (m, r), in this rank's sizes."""
        check_members(self.prefix, self.spec, len(output_partition_sizes))
        rank, structure = self.spec.rank, self.spec.structure
        check_identity_block(self.prefix, self.spec, input_size)
        split_input = isinstance(layer, RowParallelLinear)
        if structure == "narrow_in":
            input_size_per_partition, input_size = share_of_neurons(self.prefix, rank, layer.tp_size if split_input else 1), rank
            # by which LoRA divides adapters
            layer.input_size, layer.input_size_per_partition = input_size, input_size_per_partition
        columns = columns_of(layer, input_size, input_size_per_partition)
        check_groups(self.prefix, self.spec, input_size)
        check_columns(self.prefix, self.spec, columns)
        self._materialised = structure == "identity_block" and input_size_per_partition < input_size
        layer.A = None
        if structure != "narrow_in":
            layer.A = first_factor(
                "low_rank" if self._materialised else structure,
                input_size_per_partition,
                rank,
                ordered=self.spec.ordered,
                dtype=params_dtype,
                weights=self.spec.weights,
                prefix=f"{self.prefix}.A",
            )
        places = torch.arange(input_size)
        if self._materialised and self.spec.gathers:
            layer.A.order = nn.Parameter(places, requires_grad=False)
        width = input_size_per_partition if layer.A is None else rank
        m = sum(output_partition_sizes)
        layer.B = Factor(width, m, bias=True, dtype=params_dtype, weights=self.spec.weights, prefix=f"{self.prefix}.B")
        rows = rows_of_members(layer, self.spec, output_partition_sizes)
        loading = Loading(
            prefix=self.prefix,
            spec=self.spec,
            first=layer.A,
            second=layer.B,
            columns=columns,
            rows=rows,
            materialise=self._materialised,
            order=places if self.spec.ordered else None,
        )
        for holder, load in ((layer.A, loading.load_first), (layer.B, loading.load_second)):
            for kind, parameter in holder.loaded.items() if holder is not None else ():
                parameter.weight_loader = partial(load, kind)
        if self.spec.gathers:
            layer.A.order.weight_loader = loading.load_order
        layer.B.bias.weight_loader = partial(loading.load_second, "bias")
        if self.spec.residual:
            self._residual = Residual(layer, input_size_per_partition, m, self.spec.residual, dtype=params_dtype)
            self._loading_residual = LoadingResidual(self.prefix, self.spec, self._residual, columns, rows)
            self._loading_residual.hook()
        # vLLM's code expects a weight (LoRA asks for its device). A tensor for it, or for the dense layer's own bias,
        # which vLLM makes after this with the layer's loader, contradicts config.json.
        layer.weight = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
        layer.weight.weight_loader = loading.refuse
        layer.weight_loader = loading.refuse

        config = get_current_vllm_config_or_none()
        lora = config is not None and config.lora_config is not None
        self._loading, self._dummy = loading, is_dummy(config)
        if lora and (self.spec.ordered or structure == "narrow_in"):
            warnings.warn(_REORDERED, stacklevel=2)
        if split_input and layer.tp_size > 1:
            self._reduce_inside = layer.reduce_results and not lora and layer.A is not None
            self._first_rank_only = not self._reduce_inside and layer.tp_rank > 0
            if self._reduce_inside:
                layer.reduce_results = False  # vLLM's forward then does not sum the output again

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that every factor has come, and bring the factors into the kernels' layout.

        Raises:
            ArtifactError: a factor is missing from the checkpoint, by name.
        """
        assert self._loading is not None
        missing = self._loading.finish()
        if self._loading_residual is not None:
            missing += self._loading_residual.finish()
        require_complete(self.prefix, missing, dummy=self._dummy)
        if layer.bias is not None:
            # The whole bias is B.bias. The dense layer's own was never loaded, and whoever still adds it (vLLM hands it
            # out where skip_bias_add is set) must add nothing.
            layer.bias.data.zero_()
        if self._materialised and self.spec.gathers:
            del layer.A.order
        if layer.A is not None:
            layer.A.pack()
        layer.B.pack()
        if self._residual is not None:
            self._residual.pack()

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply x (..., n) -> (..., m); `bias`, the dense layer's own, is part of B's and ignored."""
        z = x if layer.A is None else layer.A.multiply(x)
        if self._reduce_inside:
            z = tensor_model_parallel_all_reduce(z)
        y: torch.Tensor = layer.B.multiply(z, with_bias=not self._first_rank_only)
        return y if self._residual is None else self._residual.add(x, y)


class StockMethod(LinearMethodBase):
    """vLLM's own method for a layer whose weights are rounded, or that has fewer outputs than the model's config says, or both.

    What it adds: the tensors that have come are counted, and the residual.
    """

    def __init__(self, prefix: str, spec: GroupSpec) -> None:
        self.prefix, self.spec = prefix, spec
        self._method: LinearMethodBase = UnquantizedLinearMethod()
        self._loading: LoadingStock | None = None
        self._residual: Residual | None = None
        self._loading_residual: LoadingResidual | None = None
        self._dummy = False

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer its real sizes, which its loaders go by, and then its weights."""
        check_members(self.prefix, self.spec, len(output_partition_sizes))
        if self.spec.structure == "narrow_out":
            linears, width = len(output_partition_sizes), share_of_neurons(self.prefix, self.spec.rank, layer.tp_size)
            layer.output_sizes = [self.spec.rank] * linears
            layer.output_partition_sizes = output_partition_sizes = [width] * linears
            layer.output_size = output_size = linears * self.spec.rank
            layer.output_size_per_partition = linears * width
        columns = columns_of(layer, input_size, input_size_per_partition)
        check_groups(self.prefix, self.spec, input_size)
        check_columns(self.prefix, self.spec, columns)
        rows = rows_of_members(layer, self.spec, output_partition_sizes)
        load = extra_weight_attrs["weight_loader"]
        sizes: dict[str, Any] = {
            "input_size_per_partition": input_size_per_partition,
            "output_partition_sizes": output_partition_sizes,
            "input_size": input_size,
            "output_size": output_size,
            "params_dtype": params_dtype,
        }
        if self.spec.weights is None:
            self._method.create_weights(layer, **sizes, **extra_weight_attrs)
        else:
            # The loader that vLLM itself gives the parameters of a compressed-tensors scheme.
            load_parameter = getattr(layer, "weight_loader_v2", load)
            self._method = linear_method(self.spec.weights)
            layer.scheme = scheme_for(layer, self.spec.weights, self.prefix, params_dtype)
            create_weights(layer.scheme, layer, self.spec.weights, self.prefix, {**sizes, "weight_loader": load_parameter})
        self._loading = LoadingStock(self.prefix, self.spec, input_size, rows)
        for kind, parameter in layer.named_parameters(recurse=False):
            parameter.weight_loader = self._loading.checked(kind, parameter.weight_loader)
        layer.weight_loader = self._loading.checked("bias", layer.weight_loader)  # of the bias, which vLLM makes after this
        if self.spec.residual:
            m = sum(output_partition_sizes)
            self._residual = Residual(layer, input_size_per_partition, m, self.spec.residual, dtype=params_dtype)
            self._loading_residual = LoadingResidual(self.prefix, self.spec, self._residual, columns, rows)
            self._loading_residual.hook()
        self._dummy = is_dummy(get_current_vllm_config_or_none())

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that every tensor has come, and bring the weights into the kernels' layout.

        Raises:
            ArtifactError: a tensor is missing from the checkpoint, by name.
        """
        assert self._loading is not None
        missing = self._loading.finish(biased=layer.bias is not None)
        if self._loading_residual is not None:
            missing += self._loading_residual.finish()
        require_complete(self.prefix, missing, dummy=self._dummy)
        self._method.process_weights_after_loading(layer)
        if self._residual is not None:
            self._residual.pack()
        if getattr(layer, "weight", layer) is None:
            # Kept by the kernel. LoRA asks for its device.
            layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply x (..., n) -> (..., m)."""
        y: torch.Tensor = self._method.apply(layer, x, bias)
        return y if self._residual is None else self._residual.add(x, y)
