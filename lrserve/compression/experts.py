"""Mixtures of experts: what is collected of them, which experts stay, and layers with fewer of them.

Notation
    g_e, f_e     the router's weight of expert e for a token, and the expert's output (m,); the mixture gives y = sum_e g_e f_e
    X_e          the tokens that are routed to expert e

REAP (arXiv 2510.13999, section 4) removes the experts of least saliency, the mean over X_e of g_e |f_e|. Experts that stay keep
their weights. A token that was routed to a removed expert goes to the next one by the router, whose weights are normalised over
those that stay. The error of removing experts is estimated by the sum over them of E[g_e^2 |f_e|^2].

In the other way all experts stay, each with equally many of its neurons: those that matter most for g_e f_e, and a down projection
that makes up for the others (`narrow.ranked`). f_e has no bias, so second moments stand in the place of covariances.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.func import functional_call

from lrserve.compression.covariance import exact_products
from lrserve.compression.filed import IN_MEMORY, Filed
from lrserve.compression.groups import ExpertNames, Family, Group, Mixture, family_of
from lrserve.compression.level import Level
from lrserve.compression.narrow import compensated, ranked
from lrserve.errors import CalibrationError, NotFiniteError


@dataclass(frozen=True)
class ExpertStatistics:
    """What the calibration text says about the experts of one layer.

    tokens (E,): how many tokens were routed to each. saliency (E,): the mean over them of g |f|, 0 where there are none.
    error (E,): the mean over all tokens of g^2 |f|^2. moments (E, n, n): the mean over all tokens of g^2 x x^T, with x (n,) the
    neurons of the expert.
    """

    tokens: torch.Tensor
    saliency: torch.Tensor
    error: torch.Tensor
    moments: torch.Tensor

    def order(self) -> torch.Tensor:
        """Return the experts (E,), the most salient first."""
        return self.saliency.argsort(descending=True, stable=True)

    def metric(self, expert: int) -> torch.Tensor:
        """Return the moment (n, n) of an expert's neurons; its diagonal alone where it saw fewer tokens than it has neurons.

        Neurons are then chosen by their own size and that of their weights, by the latter alone where there are no tokens, and
        nothing makes up for the others.
        """
        M = self.moments[expert]
        return M if self.tokens[expert] >= len(M) else M.diagonal().diag()

    def errors(self) -> torch.Tensor:
        """Return the expected squared error of the layer's output where 0, 1, ..., E experts stay, float64 (E + 1,)."""
        removed = self.error.double()[self.order()].flip(0).cumsum(0).flip(0)
        return torch.cat([removed, removed.new_zeros(1)])


class ExpertAccumulator:
    """Collects `ExpertStatistics`. All are sums over tokens, so those of disjoint texts merge exactly.

    Memory: a moment (n, n) in float32 for each expert.
    """

    def __init__(self, mixture: Mixture, device: torch.device | str = "cpu") -> None:
        self._sums = {
            name: torch.zeros(mixture.experts, dtype=torch.float64, device=device) for name in ("routed", "sizes", "squares")
        }
        self._sums["tokens"] = torch.zeros(1, dtype=torch.float64, device=device)
        self._sums["moments"] = torch.zeros(mixture.experts, mixture.n, mixture.n, device=device)

    def hook(self, module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        """Take what a module of experts is called with: tokens (t, n), and for each its experts (t, k) and their weights (t, k)."""
        x, chosen, gates = inputs
        self._sums["tokens"] += len(x)
        for expert in chosen.unique().tolist():
            token, place = torch.where(chosen == expert)
            gate, up = nn.functional.linear(x[token], module.gate_up_proj[expert]).chunk(2, dim=-1)
            neurons, weights = module.act_fn(gate) * up, gates[token, place]
            output = nn.functional.linear(neurons, module.down_proj[expert])
            sizes = output.double().norm(dim=-1) * weights.double()
            weighted = neurons * weights.to(neurons)[:, None]
            with exact_products(weighted):
                self._sums["moments"][expert].addmm_(weighted.float().T, weighted.float())
            self._sums["routed"][expert] += len(token)
            self._sums["sizes"][expert] += sizes.sum()
            self._sums["squares"][expert] += sizes.square().sum()

    def close_pool(self) -> None:
        """Do nothing: the sums do not depend on pools."""

    def state(self) -> dict[str, torch.Tensor]:
        """Return what `add` needs, on the CPU: the sums by name."""
        return {name: total.cpu() for name, total in self._sums.items()}

    def add(self, state: Mapping[str, torch.Tensor]) -> None:
        """Add the sums of another text (`state`)."""
        for name, total in self._sums.items():
            total += state[name].to(total.device)

    def finish(self) -> ExpertStatistics:
        """Return the statistics.

        Raises:
            CalibrationError: no token was seen.
            NotFiniteError: a statistic is not finite.
        """
        tokens, routed = self._sums["tokens"], self._sums["routed"]
        if not tokens:
            raise CalibrationError("no token reached this mixture of experts; give more calibration text")
        found = ExpertStatistics(
            routed.long(),
            self._sums["sizes"] / routed.clamp_min(1),
            self._sums["squares"] / tokens,
            self._sums["moments"] / tokens.float(),
        )
        if not all(torch.isfinite(tensor).all() for tensor in (found.saliency, found.error, found.moments)):
            raise NotFiniteError(
                "outputs of experts are not finite: the model overflows in this dtype on this text; load it in bfloat16 or "
                "float32, and check the weights"
            )
        return found


def rank_experts(mixture: Mixture, down: torch.Tensor, statistics: ExpertStatistics) -> dict[str, torch.Tensor]:
    """Decide what goes first of a mixture whose experts have the down projections `down` (E, m, n).

    Returns:
        `experts` (E,), those that stay longest first; `neurons` (E, n), the same of each expert; and `errors` (E + n + 2,), the
        expected squared error of the layer's output where 0, ..., E experts stay, and where 0, ..., n neurons of each do
        (`Mixture.error_index`). The latter are NaN where a decomposition fails or a number is not finite.
    """
    orders = torch.arange(mixture.n).repeat(mixture.experts, 1)
    narrower = torch.zeros(mixture.n + 1, dtype=torch.float64)
    try:
        for expert, weight in enumerate(down):
            order, errors = ranked(weight, statistics.metric(expert).to(weight.device))
            orders[expert] = order.cpu()
            narrower += errors.cpu()
    except (NotFiniteError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # which does not converge
        narrower.fill_(torch.nan)
    return {"experts": statistics.order(), "neurons": orders, "errors": torch.cat([statistics.errors(), narrower]).float()}


class FewerExpertsRouter(nn.Module):
    """The router of a family where only the first `kept` experts are there: the other rows of its `weight` (E, n) are not used."""

    def __init__(self, router: nn.Module, weight: torch.Tensor, kept: int) -> None:
        super().__init__()
        self.kept = kept
        self.weight = nn.Parameter(weight, requires_grad=router.get_parameter("weight").requires_grad)
        self._router = (router,)  # a tuple, so that torch does not register its weight as well

    def forward(self, x: torch.Tensor) -> Any:
        """Do what the family's router does, with as many rows as there are experts."""
        return functional_call(self._router[0], {"weight": self.weight[: self.kept]}, (x,))

    def extra_repr(self) -> str:
        """Numbers of experts, for `print(model)`."""
        return f"experts={self.kept} of {len(self.weight)}"


def resize_experts(layer: nn.Module, names: ExpertNames, config: Any, experts: int, width: int) -> None:
    """Let the mixture of a decoder layer have so many experts of so many neurons; their weights are uninitialised.

    The rows of the router stay.

    Raises:
        ValueError: the mixture has fewer, or the router chooses more than these.
    """
    old, router = layer.get_submodule(names.experts), layer.get_submodule(names.router)
    gate_up, down = old.get_parameter("gate_up_proj"), old.get_parameter("down_proj")
    count, hidden, neurons = down.shape
    if not (config.num_experts_per_tok <= experts <= count and 0 < width <= neurons):
        raise ValueError(
            f"{experts} experts of {width} neurons cannot be kept of {count} of {neurons}, of which a token reads "
            f"{config.num_experts_per_tok}"
        )
    with torch.device("meta"):
        smaller = type(old)(config)
    smaller.num_experts, smaller.intermediate_dim = experts, width  # type: ignore[assignment]
    for name, shape, parameter in (
        ("gate_up_proj", (experts, 2 * width, hidden), gate_up),
        ("down_proj", (experts, hidden, width), down),
    ):
        setattr(smaller, name, nn.Parameter(parameter.new_empty(shape), requires_grad=parameter.requires_grad))
    layer.set_submodule(names.experts, smaller)
    if experts < count:
        layer.set_submodule(names.router, FewerExpertsRouter(router, router.get_parameter("weight").data, experts))


def size_of_experts(layer: nn.Module, names: ExpertNames, config: Any) -> tuple[int, int] | None:
    """Return the number of experts of a decoder layer and the neurons of each where `resize_experts` changed them, else None."""
    own = layer.get_submodule(names.experts)
    with torch.device("meta"):
        whole = type(own)(config)
    sizes = [(len(down), down.shape[2]) for down in (own.get_parameter("down_proj"), whole.get_parameter("down_proj"))]
    return None if sizes[0] == sizes[1] else sizes[0]


@dataclass(frozen=True)
class KeptExperts:
    """What a mixture keeps at a level.

    `experts` (k,) by number, ascending. `neurons` (k, r) of each; None keeps all, else `statistics` are those of the mixture.
    """

    experts: torch.Tensor
    neurons: torch.Tensor | None = None
    statistics: ExpertStatistics | None = None


class ExpertSource(Protocol):
    """Where it comes from what mixtures keep."""

    def kept(self, mixture: Mixture, level: Level) -> KeptExperts:
        """Return what a mixture keeps at a level."""


@torch.no_grad()
def keep_experts(model: Any, mixture: Mixture, family: Family, kept: KeptExperts, filed: Filed = IN_MEMORY) -> None:
    """Leave a mixture these experts and neurons, with new weights where `filed` puts them.

    The rows of their router come first, those of removed experts are zero.
    """
    names = family.experts
    assert names is not None
    experts, router = model.get_submodule(mixture.members[0]), model.get_submodule(mixture.router)
    gate_up, down, rows = experts.gate_up_proj, experts.down_proj, router.weight
    chosen = kept.experts.to(down.device)
    layer = model.get_submodule(f"{family.layers}.{mixture.layer}")
    neurons = kept.neurons
    resize_experts(layer, names, model.config, len(chosen), mixture.n if neurons is None else neurons.shape[1])
    smaller = model.get_submodule(mixture.members[0])
    if neurons is None:
        smaller.gate_up_proj.copy_(gate_up[chosen])
        smaller.down_proj.copy_(down[chosen])
    else:
        assert kept.statistics is not None
        for place, expert in enumerate(kept.experts.tolist()):
            own, metric = neurons[place].to(down.device), kept.statistics.metric(expert).to(down.device)
            smaller.gate_up_proj[place] = torch.cat([part[own] for part in gate_up[expert].chunk(2)])
            smaller.down_proj[place] = compensated(down[expert], metric, own)
    if len(chosen) < mixture.experts:
        weight = torch.zeros_like(rows)
        weight[: len(chosen)] = rows[chosen]
        model.get_submodule(mixture.router).weight = nn.Parameter(weight, requires_grad=rows.requires_grad)
    filed.modules([smaller])


def keep_mixtures(model: Any, changed: Iterable[tuple[Group, Level]], source: ExpertSource, filed: Filed = IN_MEMORY) -> Any:
    """Leave the mixtures among some units of a dense model what their levels say, one after the other, and return the model."""
    family = family_of(model.config)
    for unit, level in changed:
        if isinstance(unit, Mixture):
            keep_experts(model, unit, family, source.kept(unit, level), filed)
    return model
