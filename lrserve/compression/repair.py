"""Repair: training what rounding leaves of a compressed model against the dense one, with the integers frozen.

Notation
    q (m, n), s (m, n / g)   integers and scales of a rounded weight Q = q s, g inputs of a row to a scale
    A (r, n), B (m, r)       a residual beside it: the layer multiplies by Q + B A

What is trained of the groups that a plan changes: s, A and B as real numbers, biases, and factors that are not rounded; with them
the norms of their decoder blocks. `Masters` holds all that in float32, each in a unit in which one learning rate fits. The blocks'
own forward passes run on what the masters stand for (`torch.func.functional_call`), rounded to the served dtype: what is trained is
what the exported layers compute, but for A and B, which are rounded to int8 again in the end.

`repair` trains block by block (`refine.train`) on the walk of sequential.py, each block behind the stored form of those before.
`recover_rounded` distils the dense model into the whole (`recover.distil`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lrserve.compression.assemble import parts
from lrserve.compression.calibrate import run_block
from lrserve.compression.groups import Group, family_of
from lrserve.compression.layers import Matrix, ResidualFactor
from lrserve.compression.level import SCHEMES, Level, Scheme
from lrserve.compression.recover import Distilled, Schedule, distil
from lrserve.compression.refine import train
from lrserve.compression.residual import rounded_factors
from lrserve.compression.sequential import Streams, walk_blocks
from lrserve.compression.sharding import gathered
from lrserve.compression.team import ALONE, Team
from lrserve.errors import CalibrationError

_SCALE_UNIT: Final = 160.0  # of a scale's relative change, over the number of positive values that can be stored
_NORM_UNIT: Final = 3.0  # of a norm's relative change
_SMALLEST: Final = 0.1  # of a norm's weights that changes in proportion to itself, over their root mean square
_RESIDUAL_UNIT: Final = 30.0  # over the root mean square of both factors
_TINY: Final = 1e-30

Changed = Sequence[tuple[Group, Level]]


def worth_repairing(changed: Changed) -> bool:
    """Whether rounding costs a plan so much that training block by block wins some of it back: not if all of it is to 8 bits."""
    return any(level.weights is not None and SCHEMES[level.weights].bits < 8 for _, level in changed)


class Repairs:
    """Trained tensors by their names in the compressed model's state dict, of one plan, in the dtypes that are stored."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = dict(tensors)

    @torch.no_grad()
    def apply(self, model: Any) -> Any:
        """Copy the tensors into a compressed model of this plan, in float32 or in the served dtype, and return it.

        Raises:
            CalibrationError: the model has no such tensor, or one of another shape.
        """
        own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, tensor in self.tensors.items():
            if name not in own or own[name].shape != tensor.shape:
                raise CalibrationError(f"{name} was trained for another plan; remove the work folder")
            own[name].copy_(tensor)
        return model


class _Master(nn.Module):
    """Some tensors of a model as they are trained; the forward pass returns what they stand for, by name."""

    def stored(self) -> dict[str, torch.Tensor]:
        """Return what is stored of them, by name."""
        tensors: dict[str, torch.Tensor] = self()
        return tensors


class _Scales(_Master):
    """The scales of a rounded weight, (m, n / g): where they began, and the logarithm of what became of that; signs stay."""

    start: torch.Tensor

    def __init__(self, name: str, scales: torch.Tensor, scheme: Scheme) -> None:
        super().__init__()
        self.name, self.dtype = name, scales.dtype
        self.unit = _SCALE_UNIT / 2 ** (scheme.bits - 1)
        self.register_buffer("start", scales.detach().float().clone(), persistent=False)
        self.change = nn.Parameter(torch.zeros_like(self.start))

    def forward(self) -> dict[str, torch.Tensor]:
        return {self.name: (self.start * (self.unit * self.change).exp()).to(self.dtype)}


class _Values(_Master):
    """A floating-point tensor, in a unit: a number, or one for each entry."""

    unit: torch.Tensor

    def __init__(self, name: str, values: torch.Tensor, unit: torch.Tensor) -> None:
        super().__init__()
        self.name, self.dtype = name, values.dtype
        self.register_buffer("unit", unit, persistent=False)
        self.values = nn.Parameter(values.detach().float() / unit)

    def forward(self) -> dict[str, torch.Tensor]:
        return {self.name: (self.unit * self.values).to(self.dtype)}


class _Residual(_Master):
    """A group's residual as real numbers, A (r, n) and B (m, r) of all members stacked, in one unit; every rank's are as long."""

    def __init__(self, name: str, first: ResidualFactor, seconds: Mapping[str, ResidualFactor]) -> None:
        super().__init__()
        self.name, self.members = name, list(seconds)
        self.rows = [second.out_features for second in seconds.values()]
        A, B = first.weight.float() * first.weight_scale.detach(), torch.cat([second.weight for second in seconds.values()]).float()
        longer = (B.norm(dim=0).clamp_min(_TINY) / A.norm(dim=1).clamp_min(_TINY)).sqrt()
        A, B = A * longer[:, None], B / longer
        self.unit = _RESIDUAL_UNIT * _root_mean_square(torch.cat([A.flatten(), B.flatten()]))
        self.A, self.B = nn.Parameter(A / self.unit), nn.Parameter(B / self.unit)

    def forward(self) -> dict[str, torch.Tensor]:
        return self._tensors(self.unit * self.A, self.unit * self.B, torch.ones_like(self.A[:, :1]))

    def stored(self) -> dict[str, torch.Tensor]:
        found = rounded_factors(self.unit * self.B, self.unit * self.A)
        return self._tensors(found.A, found.B, found.scales[:, None])

    def _tensors(self, A: torch.Tensor, B: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
        seconds = zip(self.members, B.split(self.rows), strict=True)
        return {f"{self.name}.weight": A, f"{self.name}.weight_scale": scales, **{f"{name}.weight": part for name, part in seconds}}


class Masters(nn.Module):
    """What is trained of a part of a compressed model, in float32, from its present values; the model itself is only read."""

    def __init__(self, masters: Iterable[_Master]) -> None:
        """Hold masters; `masters_of` and `outer_norms` make them."""
        super().__init__()
        self._masters = list(masters)
        self._registered = nn.ModuleList(self._masters)

    def forward(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """Return what the masters stand for, by the names that a submodule `prefix` of the model has for it."""
        return {name.removeprefix(prefix): tensor for part in self._masters for name, tensor in part().items()}

    @torch.no_grad()
    def stored(self) -> dict[str, torch.Tensor]:
        """Return what is to be stored, on the CPU, by its names in the model's state dict."""
        return {name: tensor.cpu().contiguous() for part in self._masters for name, tensor in part.stored().items()}


def masters_of(model: Any, changed: Changed) -> Masters:
    """Make the masters of the units that a plan changes, and of the norms in their decoder blocks."""
    modules = dict(model.named_modules())
    groups = [group for unit, _ in changed for group in parts(unit)]
    found = [master for group in groups for master in _group_masters(group, modules)]
    blocks = tuple(f"{family_of(model.config).layers}.{index}." for index in sorted({group.layer for group in groups}))
    norms = ((name, module) for name, module in modules.items() if name.startswith(blocks) and _is_norm(module))
    return Masters([*found, *(master for name, norm in norms for master in _norm_masters(name, norm))])


def outer_norms(model: Any) -> dict[str, Masters]:
    """Make the masters of the decoder's norms outside of its blocks, by the norms' names."""
    layers = family_of(model.config).layers
    decoder = f"{layers.rpartition('.')[0]}."  # beside which a multimodal model has others
    own = ((name, module) for name, module in model.named_modules() if name.startswith(decoder) and _is_norm(module))
    norms = {name: module for name, module in own if not name.startswith(f"{layers}.")}
    return {name: Masters(_norm_masters(name, norm)) for name, norm in norms.items()}


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def _norm_masters(name: str, norm: nn.Module) -> Iterator[_Master]:
    for own, weight in norm.named_parameters(recurse=False):
        yield _Values(f"{name}.{own}", weight, _norm_unit(weight))


def _group_masters(group: Group, modules: Mapping[str, nn.Module]) -> Iterator[_Master]:
    """Make the masters of a group: of its linears and, where it has several, of what they share under the group's name."""
    names = [*group.members, *({group.name} - set(group.members))]
    factors: dict[str, ResidualFactor] = {}
    for name in names:
        if name not in modules:  # nothing is shared
            continue
        for own, module in modules[name].named_modules(prefix=name):
            if isinstance(module, ResidualFactor):
                factors[own] = module
                continue
            for leaf, value in module.named_parameters(recurse=False):
                if leaf == "weight_scale" and isinstance(module, Matrix) and module.weights is not None:
                    yield _Scales(f"{own}.{leaf}", value, SCHEMES[module.weights])
                else:
                    yield _Values(f"{own}.{leaf}", value, torch.ones((), device=value.device))
    first = next((name for name, factor in factors.items() if factor.exact), None)
    if first is not None:
        yield _Residual(first, factors.pop(first), factors)


def _norm_unit(weight: torch.Tensor) -> torch.Tensor:
    """Return the unit of each weight of a norm: its own size, which smoothing may have made another for each input."""
    return _NORM_UNIT * weight.detach().float().abs().clamp_min(_SMALLEST * _root_mean_square(weight))


def _root_mean_square(values: torch.Tensor) -> float:
    """Return the size of a tensor's entries, or 1 if all are zero."""
    return float(values.detach().float().square().mean().sqrt()) or 1.0


def repair(
    model: Any,
    compressed: Any,
    changed: Changed,
    windows: torch.Tensor,
    folder: Path,
    *,
    steps: int,
    learning_rate: float = 3e-4,
    seed: int = 0,
    batch_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Repairs:
    """Train the blocks of a compressed model one by one towards the outputs of the dense ones.

    Args:
        model: the dense model.
        compressed: the compressed model in the same dtype; the repairs are applied to it.
        changed: the units that its plan changes, and their levels.
        windows, folder, batch_tokens, progress: as of `walk_blocks`.
        steps, learning_rate, seed: as of `refine.train`.

    Raises:
        NotFiniteError: a loss, activations or values that are not finite.
    """
    compressed.requires_grad_(False)
    path = family_of(compressed.config).layers
    layers = compressed.get_submodule(path)

    def improve(streams: Streams) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        layer, own = layers[streams.index], [(unit, level) for unit, level in changed if unit.layer == streams.index]
        if not own:
            return layer, {}
        masters = masters_of(compressed, own)

        def run(x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
            substitutes = masters(f"{path}.{streams.index}.")
            return run_block(lambda states, **how: functional_call(layer, substitutes, (states,), how), x, kwargs)

        train(streams, run, list(masters.parameters()), steps=steps, learning_rate=learning_rate, seed=seed)
        tensors = masters.stored()
        Repairs(tensors).apply(compressed)
        return layer, tensors

    blocks = 1 + max((unit.layer for unit, _ in changed), default=-1)
    repairs = Repairs(walk_blocks(model, blocks, windows, folder, improve, batch_tokens=batch_tokens, progress=progress))
    repairs.apply(compressed)  # those of an interrupted walk as well
    return repairs


class _Learning(nn.Module):
    """A part of a compressed model that computes by what its masters stand for."""

    def __init__(self, model: nn.Module, name: str, masters: Masters) -> None:
        """Take the place of the model's part of this name."""
        super().__init__()
        self.part, self.masters, self._prefix = model.get_submodule(name), masters, f"{name}."
        self.training = False
        model.set_submodule(name, self)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Run the part; what the masters stand for is computed anew where the part is."""
        if self.training:  # `recover` recomputes this block
            return checkpoint(self._run, *inputs, use_reentrant=False, **options)
        return self._run(*inputs, **options)

    def _run(self, *inputs: Any, **options: Any) -> Any:
        return functional_call(self.part, self.masters(self._prefix), inputs, options)


class _RoundedStudent:
    """A compressed model; the decoder blocks that its plan changes, and the norms outside of them, have masters that learn."""

    def __init__(self, model: Any, changed: Changed) -> None:
        self.model = model.requires_grad_(False)
        layers = family_of(model.config).layers
        own: dict[str, Masters] = outer_norms(model)
        for index in sorted({unit.layer for unit, _ in changed}):
            own[f"{layers}.{index}"] = masters_of(model, [(unit, level) for unit, level in changed if unit.layer == index])
        self._parts = {name: _Learning(model, name, masters) for name, masters in own.items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        named = ((f"{name}.{own}", value) for name, part in self._parts.items() for own, value in part.masters.named_parameters())
        return {name: value for name, value in named if value.requires_grad}

    def tensors(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for part in self._parts.values():
            with gathered(part):
                found |= part.masters.stored()
        return found


def recover_rounded(
    teacher: Any,
    compressed: Any,
    changed: Changed,
    windows: torch.Tensor,
    folder: Path,
    *,
    schedule: Schedule,
    seed: int,
    team: Team = ALONE,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Repairs, Distilled]:
    """Distil the dense model into a compressed one by a schedule.

    Args:
        teacher: the dense model.
        compressed: the compressed model; its values stay, and its modules are replaced by those that learn.
        changed: the units that its plan changes, and their levels.
        windows, folder, schedule, seed, team, progress: as of `recover.distil`.

    Returns:
        What to apply to the compressed model, and how the training went.

    Raises:
        NotFiniteError: the divergence is no longer finite.
    """
    how: dict[str, Any] = {"schedule": schedule, "seed": seed, "team": team, "progress": progress}
    found = distil(teacher, lambda: _RoundedStudent(compressed, changed), windows, folder, **how)
    return Repairs(found.tensors), found
