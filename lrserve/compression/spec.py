"""What config.json says about the compressed groups of an artifact, and which tensors that makes (docs/format.md)."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch

from lrserve.compression.groups import FAMILIES, ORDERED, STORED, Group, Mixture, Stored, Structure
from lrserve.compression.level import PRECISIONS, SCHEMES, Level, Precision
from lrserve.errors import ArtifactError

QUANT_METHOD: Final = "lrserve"
FORMAT_VERSIONS: Final = (1, 2)
"""That this lrserve reads. It writes 1 where nothing is rounded."""
WEIGHTS_ENTRY: Final = "transformers_weights"
"""The entry of config.json by which transformers is told the name of the file with the weights ..."""
NEEDS_LRSERVE: Final = "lrserve has compressed this model: run 'pip install lrserve' once, and 'import lrserve' before it is loaded"
"""... and what an artifact has there: no such name, so that transformers stops with these words unless lrserve takes it away."""
_LONGEST: Final = 200  # characters of a group's name
_GIVE_NEURONS: Final = {
    (names.fused.rpartition(".")[2], tuple(name.rpartition(".")[2] for name in names.members), names.stacked)
    for family in FAMILIES.values()
    for kind, names in family.groups.items()
    if kind in ORDERED.values()
}
"""Groups that give all the neurons of an MLP, by their own name, those of their members, and `stacked`."""
REPAIRED: Final = ("dense", "narrow_out", "narrow_in")
"""Structures that may have a residual."""


@dataclass(frozen=True)
class GroupSpec:
    """What an artifact's config.json says about one compressed group.

    `rank` is the number of neurons where the structure is `narrow_in` or `narrow_out`, and 0 where it is `dense`: a group that is
    only rounded. `members` are the names of the linears relative to the group's parent module (`q_proj`, ...); a group of one
    linear carries that linear's own name, whether or not the engine multiplies it together with others. `ordered`: an identity
    block whose inputs arrive as J and then Jc, so that it has no `order`. `weights`: what the stored weights are rounded to, if
    they are. `residual`: rank of B A beside the rounded weights. `stacked`, where the structure is `narrow_out`: how many linears
    lie one after the other in each member, as gate and up do where they are one tensor. `experts`: how many there are, with `rank`
    neurons each, where the structure is `experts`.
    """

    rank: int
    members: tuple[str, ...]
    structure: Stored = "low_rank"
    ordered: bool = False
    weights: Precision | None = None
    residual: int = 0
    stacked: int = 1
    experts: int = 0

    @property
    def kept(self) -> int:
        """The rank that counts (`Group.parameters`): of a mixture the neurons of all its experts."""
        return self.rank * (self.experts or 1)

    @property
    def rows(self) -> int:
        """Rows of each member of a `narrow_out` group."""
        return self.rank * self.stacked

    @property
    def gathers(self) -> bool:
        """Whether the inputs must be reordered, by an `order` that is stored with the factors."""
        return self.structure == "identity_block" and not self.ordered

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        rest = {"rank": self.rank, "members": list(self.members), "ordered": self.ordered}
        rest |= {"weights": self.weights, "residual": self.residual}
        rest |= {"stacked": self.stacked if self.stacked > 1 else 0, "experts": self.experts}
        return {"structure": self.structure, **{name: value for name, value in rest.items() if value}}


def quantization_config(groups: Mapping[str, GroupSpec]) -> dict[str, Any]:
    """Build the `quantization_config` entry of config.json (docs/format.md)."""
    return {
        "quant_method": QUANT_METHOD,
        "format_version": 2 if any(spec.weights for spec in groups.values()) else 1,
        "groups": {name: spec.to_json() for name, spec in groups.items()},
    }


def compressed_tensors_config(precision: Precision, targets: Sequence[str], ignored: Sequence[str] = ()) -> dict[str, Any]:
    """Return the `quantization_config` of a compressed-tensors checkpoint whose linears are all in this precision."""
    scheme = SCHEMES[precision]
    common = {"num_bits": scheme.bits, "type": "float" if scheme.floating else "int", "symmetric": True}
    weights: dict[str, Any] = {**common, "dynamic": False, "strategy": "group" if scheme.group else "channel"}
    if scheme.group:
        weights["group_size"] = scheme.group
    inputs = {**common, "dynamic": True, "strategy": "token"} if scheme.rounds_inputs else None
    kind = "float-quantized" if scheme.floating else "pack-quantized" if scheme.group else "int-quantized"
    group = {"targets": list(targets), "weights": weights, "input_activations": inputs, "format": kind}
    return {"quant_method": "compressed-tensors", "format": kind, "ignore": list(ignored), "config_groups": {"group_0": group}}


def parse_groups(config: Mapping[str, Any]) -> dict[str, GroupSpec]:
    """Read and check the `groups` of a `quantization_config`.

    Raises:
        ArtifactError: an unknown format version, an unknown structure, or a malformed entry; nothing is guessed.
    """
    version = config.get("format_version")
    if type(version) is not int or version not in FORMAT_VERSIONS:
        raise ArtifactError(
            f"quantization_config.format_version is {reprlib.repr(version)}; this lrserve reads "
            f"{' and '.join(map(str, FORMAT_VERSIONS))}. Install the lrserve that wrote the artifact, or export it again"
        )
    groups = config.get("groups")
    if not isinstance(groups, Mapping):
        raise ArtifactError("quantization_config.groups is missing from config.json; export the artifact again")
    if long := next((name for name in groups if len(str(name)) > _LONGEST), None):
        raise ArtifactError(
            f"quantization_config.groups names {long[:_LONGEST]}..., which no layer is called; export the artifact again"
        )
    specs = {str(name): _parse(str(name), entry if isinstance(entry, Mapping) else {}) for name, entry in groups.items()}
    if version == 1 and (name := next((name for name, spec in specs.items() if spec.weights), None)):
        raise ArtifactError(f"{name}: rounded weights need format_version 2, config.json says 1. Export the artifact again")
    _check_apart(specs)
    _check_neurons(specs)
    return specs


def _parse(name: str, entry: Mapping[str, Any]) -> GroupSpec:
    structure: Any = entry.get("structure")
    rank, members = entry.get("rank"), entry.get("members")
    ordered, weights, residual = entry.get("ordered", False), entry.get("weights"), entry.get("residual", 0)
    stacked, experts = entry.get("stacked", 1), entry.get("experts", 0)
    if structure not in STORED:
        raise ArtifactError(
            f"{name}: unknown structure {reprlib.repr(structure)} in config.json; this lrserve reads {', '.join(STORED)}"
        )
    if structure == "dense":
        if rank is not None or weights is None:
            raise ArtifactError(f"{name}: a dense group in config.json has weights and no rank. Export the artifact again")
    elif type(rank) is not int or rank < 1:
        raise ArtifactError(f"{name}: rank {reprlib.repr(rank)} in config.json is not a positive integer")
    if not isinstance(members, (list, tuple)) or not members or not all(isinstance(x, str) for x in members):
        raise ArtifactError(f"{name}: members {reprlib.repr(members)} in config.json is not a list of layer names")
    if not isinstance(ordered, bool) or (ordered and structure != "identity_block"):
        raise ArtifactError(f"{name}: ordered {reprlib.repr(ordered)} in config.json does not fit the structure {structure}")
    if type(stacked) is not int or stacked < 1 or (stacked > 1 and structure != "narrow_out"):
        raise ArtifactError(f"{name}: stacked {reprlib.repr(stacked)} in config.json does not fit the structure {structure}")
    if structure == "narrow_out" and (name.rpartition(".")[2], tuple(members), stacked) not in _GIVE_NEURONS:
        raise ArtifactError(f"{name}: config.json removes neurons from a part of an MLP only. Export the artifact again")
    if type(experts) is not int or (experts > 0) != (structure == "experts"):
        raise ArtifactError(f"{name}: experts {reprlib.repr(experts)} in config.json does not fit the structure {structure}")
    if experts and weights is not None:
        raise ArtifactError(f"{name}: experts in config.json cannot have weights. Export the artifact again")
    if weights not in (None, *PRECISIONS):
        raise ArtifactError(
            f"{name}: unknown weights {reprlib.repr(weights)} in config.json; this lrserve reads {', '.join(PRECISIONS)}"
        )
    if type(residual) is not int or residual < 0 or ("residual" in entry and not residual):
        raise ArtifactError(f"{name}: residual {reprlib.repr(residual)} in config.json is not a positive integer")
    if residual and (weights is None or structure not in REPAIRED):
        raise ArtifactError(f"{name}: a residual in config.json needs weights, and one of the structures {', '.join(REPAIRED)}")
    return GroupSpec(rank or 0, tuple(members), structure, ordered, weights, residual, stacked, experts)


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


def specs_of(changed: Iterable[tuple[Group, Level]], structure: Structure) -> dict[str, GroupSpec]:
    """Say in the artifact's terms what a plan makes of the units that it changes; inputs are ordered wherever they can be."""
    specs: dict[str, GroupSpec] = {}
    for unit, level in changed:
        if isinstance(unit, Mixture):
            experts, width = unit.sizes(level)
            specs[unit.name] = GroupSpec(width, leaves(unit.members), "experts", experts=experts)
            continue
        whole = level.rank is None
        ordered = structure == "identity_block" and unit.ordered and not whole
        stored: Stored = "dense" if whole else unit.stored_as(structure)
        specs[unit.name] = GroupSpec(level.rank or 0, leaves(unit.members), stored, ordered, level.weights, level.residual)
        if unit.fed_by:
            stored = "dense" if whole else "narrow_out"
            members, stacked = leaves(unit.fed_by.members), 1 if whole else unit.fed_by.stacked
            specs[unit.fed_by.name] = GroupSpec(level.rank or 0, members, stored, False, level.weights, level.residual, stacked)
    return specs


def leaves(members: Iterable[str]) -> tuple[str, ...]:
    """Return the names of linears relative to their parent, as a `GroupSpec` has them."""
    return tuple(name.rpartition(".")[2] for name in members)


class Tensor(NamedTuple):
    """A stored tensor: its shape, and its dtype; None is the dtype that config.json names."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


def weight_tensors(m: int, n: int, weights: Precision | None) -> dict[str, Tensor]:
    """Return what a weight (m, n) is stored as, by the last part of the names; rounded ones as compressed-tensors stores them."""
    if weights is None:
        return {"weight": Tensor((m, n), None)}
    scheme = SCHEMES[weights]
    if scheme.group is not None:
        return {
            "weight_packed": Tensor((m, n * scheme.bits // 32), torch.int32),
            "weight_scale": Tensor((m, n // scheme.group), None),
            "weight_shape": Tensor((2,), torch.int64),
        }
    values = torch.float8_e4m3fn if scheme.floating else torch.int8
    return {"weight": Tensor((m, n), values), "weight_scale": Tensor((m, 1), torch.float32)}


def residual_tensors(m: int, n: int, rank: int) -> dict[str, Tensor]:
    """Return what a residual B A (m, n) is stored as, by the last two parts of the names."""
    return {
        "residual_A.weight": Tensor((rank, n), torch.int8),
        "residual_A.weight_scale": Tensor((rank, 1), torch.float32),
        "residual_B.weight": Tensor((m, rank), torch.int8),
    }


def matrices(group: Group, spec: GroupSpec) -> dict[str, tuple[int, int]]:
    """Return the names, without `weight`, and the shapes (m, n) of a group's weights; of its residual there are none here."""
    rank, outputs = spec.rank, dict(zip(group.members, group.out_features, strict=True))
    if spec.structure == "dense":
        return {member: (m, group.n) for member, m in outputs.items()}
    if spec.structure == "narrow_out":
        return dict.fromkeys(outputs, (spec.rows, group.n))
    first = {"low_rank": (rank, group.n), "identity_block": (rank, group.n - rank)}.get(spec.structure)
    return ({f"{group.name}.A": first} if first else {}) | {f"{member}.B": (m, rank) for member, m in outputs.items()}


def tensors_of(group: Group, spec: GroupSpec) -> dict[str, Tensor]:
    """Return every tensor that an artifact must have for a group; a `dense` or `narrow_out` linear may have a bias besides."""
    wanted: dict[str, Tensor] = {}
    for name, (m, n) in matrices(group, spec).items():
        wanted |= {f"{name}.{tensor}": found for tensor, found in weight_tensors(m, n, spec.weights).items()}
        if name.endswith(".B"):
            wanted[f"{name}.bias"] = Tensor((m,), None)
    if spec.gathers:
        wanted[f"{group.name}.A.order"] = Tensor((group.n,), torch.int32)
    if spec.residual:
        n = spec.rank if spec.structure == "narrow_in" else group.n
        for member, m in zip(group.members, group.out_features, strict=True):
            rows = spec.rows if spec.structure == "narrow_out" else m
            for tensor, found in residual_tensors(rows, n, spec.residual).items():
                wanted[f"{member if tensor.startswith('residual_B') else group.name}.{tensor}"] = found
    return wanted


def check_groups(name: str, spec: GroupSpec, n: int) -> None:
    """Refuse scales for groups of inputs, of an engine's or of a model's layer with n inputs, that do not come out even."""
    widths = {
        "dense": [n],
        "narrow_out": [n],
        "narrow_in": [spec.rank],
        "low_rank": [n, spec.rank],
        "identity_block": [n - spec.rank, spec.rank],
    }[spec.structure]
    if spec.weights and (odd := [width for width in widths if not SCHEMES[spec.weights].fits(width)]):
        raise ArtifactError(f"{name}: {odd[0]} inputs cannot be divided into groups of {spec.weights}. Export the artifact again")


def is_permutation(order: torch.Tensor) -> bool:
    """Say whether an identity block's `order` (n,) is what it must be: the int32 numbers 0 to n - 1, each of them once."""
    wanted = torch.arange(order.numel(), dtype=torch.int32, device=order.device)
    return order.dtype == torch.int32 and torch.equal(order.sort().values, wanted)
