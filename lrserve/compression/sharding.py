"""Models divided among processes: fully sharded data parallelism (FSDP; Zhao et al., arXiv 2304.11277), by torch's `fully_shard`.

Each process keeps its rows of every parameter of a decoder block, and of their gradients and moments. A block's parameters are
whole while it runs, forwards or backwards; gradients are added up over the processes into these rows. What stands outside of the
decoder blocks and does not learn is whole in every process: the embedding and the output layer. torch.distributed is initialised,
and all processes call the same functions in the same order where these are collective operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lrserve.compression.groups import family_of


def shard(model: Any) -> None:
    """Divide a model's decoder blocks, and what learns beside them, among all processes; its parameters are other objects then.

    The rounded weights, which are buffers, become frozen parameters, so that they are divided as well.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (torch.distributed.get_world_size(),))
    base, layers = model.base_model, model.get_submodule(family_of(model.config).layers)
    beside = [part for part in base.children() if part is not layers and any(own.requires_grad for own in part.parameters())]
    for part in (*layers, *beside):
        for module in part.modules():
            _freeze_matrices(module)
        for parameter in part.parameters():
            parameter.data = parameter.data.contiguous()
        fully_shard(part, mesh=mesh, ignored_params={own for own in part.parameters() if not own.numel()})
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    fully_shard(base, mesh=mesh, ignored_params={own for own in base.parameters() if not is_divided(own)})


def _freeze_matrices(module: nn.Module) -> None:
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.dim() > 1:
            delattr(module, name)
            module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))


def is_divided(tensor: torch.Tensor) -> bool:
    """Whether this process has only some rows of a tensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all rows of a tensor; a collective operation if it is divided."""
    full: torch.Tensor = tensor.full_tensor() if is_divided(tensor) else tensor  # type: ignore[attr-defined]
    return full


def divided_as(like: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return the rows of whole values that this process has of another tensor, as a tensor of the same kind."""
    if not is_divided(like):
        return values
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(values.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Let the parameters of a part that `shard` divides be whole for a while; a collective operation if they are divided."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()
