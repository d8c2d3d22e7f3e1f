"""The low-rank layer in torch, and putting it in the place of dense linears.

y = B z + b, with z = A x or, for an identity block, z = x_J + T x_Jc (docs/methods.md, "Structures"). The members of a fused group
share what makes z, which stands once in the model under the group's name; each member keeps its own rows of B and b. Names in the
state dict are those of docs/format.md: `<group>.A.weight` (A or T), `<group>.A.order` (identity blocks whose inputs are not
ordered), `<member>.B.weight`, `<member>.B.bias`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from lrserve.compression.dense_weight import DenseWeight
from lrserve.compression.factorize import Factors
from lrserve.compression.groups import ORDERED, STORED, Group, Stored, Structure, family_of, is_dense
from lrserve.errors import ArtifactError, CalibrationError

QUANT_METHOD = "lrserve"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class GroupSpec:
    """What an artifact's config.json says about one compressed group.

    `rank` is the number of neurons where the structure is `narrow_in` or `narrow_out`. `members` are the names of the linears
    relative to the group's parent module (`q_proj`, ...); a group of one linear carries that linear's own name, whether or not the
    engine multiplies it together with others. `ordered`: an identity block whose inputs arrive as J and then Jc, so that it has
    no `order`.
    """

    rank: int
    members: tuple[str, ...]
    structure: Stored = "low_rank"
    ordered: bool = False

    @property
    def gathers(self) -> bool:
        """Whether the inputs must be reordered, by an `order` that is stored with the factors."""
        return self.structure == "identity_block" and not self.ordered

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        ordered = {"ordered": True} if self.ordered else {}
        return {"structure": self.structure, "rank": self.rank, "members": list(self.members), **ordered}


def quantization_config(groups: Mapping[str, GroupSpec]) -> dict[str, Any]:
    """Build the `quantization_config` entry of config.json (docs/format.md)."""
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "groups": {name: spec.to_json() for name, spec in groups.items()},
    }


def parse_groups(config: Mapping[str, Any]) -> dict[str, GroupSpec]:
    """Read and check the `groups` of a `quantization_config`.

    Raises:
        ArtifactError: another format version, an unknown structure, or a malformed entry; nothing is guessed.
    """
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"quantization_config.format_version is {version!r}; this lrserve reads {FORMAT_VERSION}. "
            "Install the lrserve that wrote the artifact, or export it again"
        )
    groups = config.get("groups")
    if not isinstance(groups, Mapping):
        raise ArtifactError("quantization_config.groups is missing from config.json; export the artifact again")
    specs: dict[str, GroupSpec] = {}
    for name, entry in groups.items():
        structure: Any = entry.get("structure") if isinstance(entry, Mapping) else None
        rank = entry.get("rank") if isinstance(entry, Mapping) else None
        members = entry.get("members") if isinstance(entry, Mapping) else None
        ordered = entry.get("ordered", False) if isinstance(entry, Mapping) else False
        if structure not in STORED:
            raise ArtifactError(f"{name}: unknown structure {structure!r} in config.json; this lrserve reads {', '.join(STORED)}")
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ArtifactError(f"{name}: rank {rank!r} in config.json is not a positive integer")
        if not isinstance(members, (list, tuple)) or not members or not all(isinstance(x, str) for x in members):
            raise ArtifactError(f"{name}: members {members!r} in config.json is not a list of layer names")
        if not isinstance(ordered, bool) or (ordered and structure != "identity_block"):
            raise ArtifactError(f"{name}: ordered {ordered!r} in config.json does not fit the structure {structure}")
        if structure == "narrow_out" and tuple(members) == (str(name).rpartition(".")[2],):
            raise ArtifactError(f"{name}: config.json removes neurons from one linear of an MLP only. Export the artifact again")
        specs[str(name)] = GroupSpec(rank=rank, members=tuple(members), structure=structure, ordered=ordered)
    _check_apart(specs)
    _check_neurons(specs)
    return specs


def _check_apart(specs: Mapping[str, GroupSpec]) -> None:
    """No linear is listed both alone and in a group."""
    for name, spec in specs.items():
        parent, _, leaf = name.rpartition(".")
        twice = [member for member in spec.members if member != leaf and f"{parent}.{member}" in specs]
        if twice:
            raise ArtifactError(f"{name}: config.json lists its member {twice[0]} alone as well. Export the artifact again")


def _check_neurons(specs: Mapping[str, GroupSpec]) -> None:
    """Hold the two halves of every MLP with fewer neurons against each other."""
    halves: dict[str, dict[str, int]] = {}
    for name, spec in specs.items():
        if spec.structure in ("narrow_in", "narrow_out"):
            halves.setdefault(name.rpartition(".")[0], {})[spec.structure] = spec.rank
    for name, ranks in halves.items():
        if len(ranks) < 2 or len(set(ranks.values())) > 1:
            found = ", ".join(f"{rank} in {structure}" for structure, rank in ranks.items())
            raise ArtifactError(
                f"{name}: config.json removes neurons from one half of it only ({found}). Export the artifact again"
            )


class Factor(nn.Module):
    """y = W x + b, x (..., n), y (..., m): `weight` (m, n) and, if wanted, `bias` (m,), uninitialised.

    Not an `nn.Linear`: tools that look for linear layers, such as PEFT's `target_modules="all-linear"`, must find the compressed
    layer and not its factors.
    """

    bias: nn.Parameter | None

    def __init__(self, n: int, m: int, *, bias: bool, dtype: torch.dtype | None = None, device: Any = None) -> None:
        super().__init__()
        self.in_features = n
        self.weight = nn.Parameter(torch.empty(m, n, dtype=dtype, device=device))
        self.register_parameter("bias", nn.Parameter(torch.empty(m, dtype=dtype, device=device)) if bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x (..., n) -> (..., m)."""
        return nn.functional.linear(x, self.weight, self.bias)


class IdentityBlock(nn.Module):
    """z = x_J + T x_Jc, x (..., n), z (..., r): `weight` is T (r, n - r), `order` (n,) int32 names J's inputs and then Jc's.

    `order` is None where the inputs arrive in that order.
    """

    order: torch.Tensor | None

    def __init__(self, n: int, rank: int, ordered: bool, dtype: torch.dtype | None = None, device: Any = None) -> None:
        super().__init__()
        self.in_features, self.rank = n, rank
        self.weight = nn.Parameter(torch.empty(rank, n - rank, dtype=dtype, device=device))
        self.register_buffer("order", None if ordered else torch.empty(n, dtype=torch.int32, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Reorder x (..., n) if need be, then interpolate -> (..., r)."""
        x = x if self.order is None else x.index_select(-1, self.order)
        pivots, others = x.split_with_sizes([self.rank, self.weight.shape[1]], -1)
        return pivots + nn.functional.linear(others, self.weight)


def is_permutation(order: torch.Tensor) -> bool:
    """Say whether an identity block's `order` (n,) is what it must be: the int32 numbers 0 to n - 1, each of them once."""
    wanted = torch.arange(order.numel(), dtype=torch.int32, device=order.device)
    return order.dtype == torch.int32 and torch.equal(order.sort().values, wanted)


def first_factor(spec: GroupSpec, n: int, dtype: torch.dtype | None = None, device: Any = None) -> Factor | IdentityBlock:
    """Build what makes z (..., r) of x (..., n), uninitialised."""
    if spec.structure == "identity_block":
        return IdentityBlock(n, spec.rank, spec.ordered, dtype=dtype, device=device)
    return Factor(n, spec.rank, bias=False, dtype=dtype, device=device)


class FirstFactor(nn.Module):
    """Holder of the A that the members of a fused group share."""

    def __init__(self, A: Factor | IdentityBlock) -> None:
        super().__init__()
        self.A = A


class LowRankLinear(nn.Linear):
    """y = B z + b, x (..., n), y (..., m): a linear layer whose weight is computed from its factors when somebody reads it.

    `A`, which makes z of x, is None where x arrives as z: fewer inputs than the dense layer has. It may belong to a `FirstFactor`
    and only be borrowed here, so that it is stored, moved and counted once; otherwise the layer owns it. Sharing is of the weight:
    each member computes z by itself, since the models' own code calls q, k and v one by one. The serving engine computes it once.

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
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which makes a dense weight
        self.out_features, self.rank = m, rank
        self._shared = (A,) if isinstance(A, FirstFactor) else None  # a tuple, so that torch does not register it twice
        if not isinstance(A, FirstFactor):
            self.A = A
        self.B = Factor(rank, m, bias=True, dtype=dtype, device=device)
        self.in_features = rank if self.first is None else self.first.in_features

    @property
    def first(self) -> Factor | IdentityBlock | None:
        """What makes z of x, borrowed or owned; None where nothing has to be made."""
        return self._shared[0].A if self._shared is not None else self.A

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The dense weight (m, n) that the factors stand for, to read; where there is no first factor it is B's own."""
        if self.first is None:
            return self.B.weight
        return DenseWeight((self.out_features, self.in_features), self.B.weight, self._product)

    @property
    def bias(self) -> nn.Parameter:  # type: ignore[override]
        """B's bias (m,)."""
        return self.B.get_parameter("bias")

    @torch.no_grad()
    def _product(self) -> torch.Tensor:
        B, first = self.B.weight, self.first
        if not isinstance(first, IdentityBlock):
            return B if first is None else B @ first.weight
        W = torch.cat([B, B @ first.weight], dim=1)
        return W if first.order is None else torch.empty_like(W).index_copy_(1, first.order.long(), W)

    @property
    def shares(self) -> bool:
        """Whether what makes z of x is borrowed, from the group that other linears are members of."""
        return self._shared is not None

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
        y: torch.Tensor = self.B(x if self.first is None else self.first(x))
        return y

    def extra_repr(self) -> str:
        """Shapes, for `print(model)`."""
        return f"out_features={self.out_features}, rank={self.rank}, structure={self.structure}"


def specs_of(ranks: Iterable[tuple[Group, int]], structure: Structure) -> dict[str, GroupSpec]:
    """Say in the artifact's terms what is compressed and to which rank; inputs are ordered wherever they can be."""
    specs: dict[str, GroupSpec] = {}
    for group, rank in ranks:
        ordered = structure == "identity_block" and group.ordered
        specs[group.name] = GroupSpec(rank, leaves(group.members), group.stored_as(structure), ordered)
        if group.fed_by:
            specs[group.fed_by.name] = GroupSpec(rank, leaves(group.fed_by.members), "narrow_out")
    return specs


def leaves(members: Iterable[str]) -> tuple[str, ...]:
    """Return the names of linears relative to their parent, as a `GroupSpec` has them."""
    return tuple(name.rpartition(".")[2] for name in members)


def install_low_rank(model: nn.Module, specs: Mapping[str, GroupSpec], prefix: str = "") -> None:
    """Replace the dense linears of every listed group by `LowRankLinear` layers with uninitialised factors.

    Those that lose outputs are left to linears of their own kind: uninitialised on the meta device, else for `keep_outputs`.

    `prefix` is cut off the group names first: a base model loaded from a causal LM's checkpoint has no `model.` level.

    Raises:
        ArtifactError: a listed group whose linears the model does not have.
    """
    for name, spec in specs.items():
        parent_name, _, leaf = name.removeprefix(prefix).rpartition(".")
        linears: list[nn.Linear] = []
        try:
            parent = model.get_submodule(parent_name)
            for member in spec.members:
                linear = parent.get_submodule(member)
                if not is_dense(linear):
                    raise ArtifactError(f"{name}: {member} is a {type(linear).__name__}, not a dense linear layer")
                linears.append(linear)
        except AttributeError as error:
            raise ArtifactError(f"{name}: config.json names a layer that the model does not have ({error})") from None
        weight = linears[0].weight
        if spec.structure == "narrow_out":
            for member, linear in zip(spec.members, linears, strict=True):
                if spec.rank > linear.out_features:
                    raise ArtifactError(f"{name}: {spec.rank} of {linear.out_features} neurons cannot be kept")
                if weight.is_meta:
                    biased = linear.bias is not None
                    fewer = nn.Linear(linear.in_features, spec.rank, biased, dtype=weight.dtype, device=weight.device)
                    setattr(parent, member, fewer)
            continue
        if spec.structure == "identity_block" and spec.rank >= linears[0].in_features:
            raise ArtifactError(f"{name}: an identity block of rank {spec.rank} leaves nothing of {linears[0].in_features} inputs")
        A: Factor | IdentityBlock | FirstFactor | None = None
        if spec.structure != "narrow_in":
            first = first_factor(spec, linears[0].in_features, weight.dtype, weight.device)
            A = first if spec.members == (leaf,) else FirstFactor(first)
        if isinstance(A, FirstFactor):
            parent.add_module(leaf, A)
        for member, linear in zip(spec.members, linears, strict=True):
            setattr(parent, member, LowRankLinear(linear.out_features, spec.rank, A, weight.dtype, weight.device))


@torch.no_grad()
def load_factors(model: nn.Module, group: Group, factors: Factors, dtype: torch.dtype | None = None) -> None:
    """Copy one group's factors into the layers that `install_low_rank` made.

    Args:
        model: where `install_low_rank` ran.
        group: names and row counts.
        factors: of the structure that the layers were made for (`structured`). Where the layers want their inputs ordered, the
            outputs that these come from are for the caller to reorder (`reorder_outputs`).
        dtype: round the factors to this dtype first, for a model that computes in a wider one.

    Raises:
        CalibrationError: a factor that is not finite in the dtype it is stored in.
    """
    rows = list(group.out_features)
    for member, B, b in zip(group.members, torch.split(factors.B, rows), torch.split(factors.b, rows), strict=True):
        layer = model.get_submodule(member)
        if not isinstance(layer, LowRankLinear):
            raise TypeError(f"{member} is a {type(layer).__name__}, not a LowRankLinear")
        parameters = [(layer.B.weight, B), (layer.bias, b)]
        if layer.first is not None:
            parameters.append((layer.first.weight, factors.A))
        for parameter, value in parameters:
            _copy_rounded(member, parameter, value, dtype)
        if isinstance(layer.first, IdentityBlock):
            if factors.order is None:
                raise TypeError(f"{member} is an identity block, the factors are not")
            if layer.first.order is not None:
                layer.first.order.copy_(factors.order)


def _copy_rounded(member: str, parameter: torch.Tensor, value: torch.Tensor, dtype: torch.dtype | None) -> None:
    rounded = value.to(dtype or parameter.dtype)
    if not torch.isfinite(rounded).all():
        raise CalibrationError(f"{member}: a factor is not finite in {rounded.dtype}; keep this group dense")
    parameter.copy_(rounded)


@torch.no_grad()
def load_feeding(model: Any, group: Group, feeding: torch.Tensor, dtype: torch.dtype) -> None:
    """Copy trained rows (members k, d) into the linears of a group of which `keep_outputs` left k outputs, rounded to `dtype`.

    Raises:
        CalibrationError: a row that is not finite in that dtype.
    """
    for member, rows in zip(group.members, feeding.chunk(len(group.members)), strict=True):
        _copy_rounded(member, model.get_submodule(member).weight, rows, dtype)


@torch.no_grad()
def keep_outputs(model: Any, group: Group, kept: torch.Tensor) -> None:
    """Let each dense linear of a group give only the outputs `kept` (k,), in that order."""
    for member in group.members:
        linear = model.get_submodule(member)
        rows = kept.long().to(linear.weight.device)
        smaller = nn.Linear(linear.in_features, len(kept), linear.bias is not None, device="meta", dtype=linear.weight.dtype)
        for name, parameter in linear.named_parameters():
            setattr(smaller, name, nn.Parameter(parameter[rows], requires_grad=parameter.requires_grad))
        model.set_submodule(member, smaller)


@torch.no_grad()
def reorder_outputs(model: Any, group: Group, order: torch.Tensor) -> None:
    """Let the inputs of a group of a kind in `ORDERED` arrive in `order` (n,): the rows of what they come from change places.

    Exact, and costs nothing when the model runs. Adapters that were trained on the rows in their old places no longer fit.
    """
    family = family_of(model.config)
    for member in family.groups[ORDERED[group.kind]].members:
        layer = model.get_submodule(f"{family.layers}.{group.layer}.{member}")
        rows = layer.B if isinstance(layer, LowRankLinear) else layer
        for parameter in rows.parameters():
            parameter.copy_(parameter[order.to(parameter.device)])


def stored_tensors(files: Iterable[Path]) -> tuple[dict[str, tuple[int, ...]], dict[str, torch.Tensor]]:
    """Return every tensor's shape, from the headers of safetensors files, and the identity blocks' orders themselves."""
    shapes: dict[str, tuple[int, ...]] = {}
    orders: dict[str, torch.Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                shapes[name] = tuple(file.get_slice(name).get_shape())
                if name.endswith(".A.order"):
                    orders[name] = file.get_tensor(name)
    return shapes, orders
