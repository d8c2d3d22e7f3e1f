"""Which linear layers form which fused group: the only file that knows the module names of an architecture.

A fused group is the unit of allocation: the linears that the serving engine multiplies as one matrix because they read the same
input (docs/methods.md, "Fused groups"). Its members' weights are stacked by rows into one W (m, n); its factors are one shared
A (r, n) and one stacked B (m, r), of which each member owns its rows.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, TypeGuard, get_args

from lrserve.compression.level import SCHEMES, Level, Precision
from lrserve.errors import UnsupportedModelError

if TYPE_CHECKING:  # recipes name kinds and structures, and are read without torch
    from torch import nn

Kind = Literal["qkv", "o", "gate_up", "down"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

Stored = Literal["identity_block", "low_rank", "narrow_in", "narrow_out", "dense", "experts"]
"""What a compressed group is stored as (docs/methods.md, "Structures").

In this order: B (x_J + T x_Jc) + b, B (A x) + b, fewer inputs, fewer outputs, W x + b, whose weight is only rounded, and a mixture
of fewer or narrower experts.
"""
STORED: Final = get_args(Stored)

Structure = Literal["identity_block", "low_rank", "narrow"]
"""What a plan makes of the groups: all of them factors of one kind, or MLPs with fewer neurons and two factors elsewhere."""
STRUCTURES: Final = get_args(Structure)

_EXPERT_LEVELS: Final = 16

ORDERED: Final[Mapping[str, str]] = {"down": "gate_up"}
"""Kinds whose inputs may come in any order, and the kind that they come from: each of its linears gives all of them, and only
pointwise functions stand between. True of MLPs, gated or plain. Those inputs are the MLP's *neurons*."""


@dataclass(frozen=True)
class GroupNames:
    """Names of one fused group inside a decoder layer: its own, and those of the linears that the checkpoint has of it.

    `stacked`, of the group that gives an MLP's neurons: how many linears lie one after the other in each member, each with a row
    for every neuron. 2 where gate and up are one tensor.
    """

    fused: str
    members: tuple[str, ...]
    stacked: int = 1


@dataclass(frozen=True)
class ExpertNames:
    """Names of a mixture of experts inside a decoder layer.

    `experts` and `router` are modules of transformers. `fused` is the module that vLLM builds for the experts; config.json lists
    the mixture by it.
    """

    experts: str
    router: str
    fused: str


@dataclass(frozen=True)
class Family:
    """Where an architecture keeps its decoder layers, and the fused groups inside one layer, by kind.

    `scaled_by`, by kind: the norm or linear inside the layer to whose parameters the group's inputs are proportional, one by one:
    to its last rows, if it has more of them than the group has inputs. A kind without one is left out: the norms of Gemma multiply
    by 1 + w, and OLMo 2 has none before its linears.

    `experts`: where a layer keeps a mixture of experts, if it has one in the MLP's place.

    `multimodal`: the decoder layers are those of an LLM inside a model that reads images too. What reads them stays as it is.
    """

    layers: str
    groups: Mapping[str, GroupNames]
    scaled_by: Mapping[str, str]
    experts: ExpertNames | None = None
    multimodal: bool = False

    def experts_in(self, layer: nn.Module) -> nn.Module | None:
        """Return the experts of a decoder layer, None if it has none."""
        try:
            return None if self.experts is None else layer.get_submodule(self.experts.experts)
        except AttributeError:
            return None

    def groups_in(self, layer: nn.Module) -> Mapping[str, GroupNames]:
        """Return the groups of a decoder layer by kind: attention's alone where it has experts."""
        if self.experts_in(layer) is None:
            return self.groups
        return {kind: names for kind, names in self.groups.items() if kind not in {*ORDERED, *ORDERED.values()}}


_LLAMA_LIKE: Final = Family(
    layers="model.layers",
    groups={
        "qkv": GroupNames("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        "o": GroupNames("self_attn.o_proj", ("self_attn.o_proj",)),
        "gate_up": GroupNames("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
        "down": GroupNames("mlp.down_proj", ("mlp.down_proj",)),
    },
    scaled_by={
        "qkv": "input_layernorm",
        "o": "self_attn.v_proj",
        "gate_up": "post_attention_layernorm",
        "down": "mlp.up_proj",
    },
)
_SCALED_BY_LINEARS: Final = replace(_LLAMA_LIKE, scaled_by={kind: _LLAMA_LIKE.scaled_by[kind] for kind in ("o", "down")})


def _inside(family: Family) -> Family:
    """Return the family of a multimodal model whose LLM is of this one."""
    return replace(family, layers="model.language_model.layers", multimodal=True)


FAMILIES: Final[Mapping[str, Family]] = {
    "LlamaForCausalLM": _LLAMA_LIKE,
    "MistralForCausalLM": _LLAMA_LIKE,
    "Qwen2ForCausalLM": _LLAMA_LIKE,
    "Qwen3ForCausalLM": _LLAMA_LIKE,
    "Gemma3ForCausalLM": _SCALED_BY_LINEARS,
    "SmolLM3ForCausalLM": _LLAMA_LIKE,
    "GraniteForCausalLM": _LLAMA_LIKE,
    "Olmo2ForCausalLM": _SCALED_BY_LINEARS,
    "Phi3ForCausalLM": Family(
        layers="model.layers",
        groups={
            **_LLAMA_LIKE.groups,
            "qkv": GroupNames("self_attn.qkv_proj", ("self_attn.qkv_proj",)),
            "gate_up": GroupNames("mlp.gate_up_proj", ("mlp.gate_up_proj",), stacked=2),
        },
        scaled_by={**_LLAMA_LIKE.scaled_by, "o": "self_attn.qkv_proj", "down": "mlp.gate_up_proj"},
    ),
    "Starcoder2ForCausalLM": Family(
        layers="model.layers",
        groups={
            **_LLAMA_LIKE.groups,
            "gate_up": GroupNames("mlp.c_fc", ("mlp.c_fc",)),
            "down": GroupNames("mlp.c_proj", ("mlp.c_proj",)),
        },
        # Not down: the activation stands between.
        scaled_by={kind: _LLAMA_LIKE.scaled_by[kind] for kind in ("qkv", "o", "gate_up")},
    ),
    "MixtralForCausalLM": replace(_LLAMA_LIKE, experts=ExpertNames("mlp.experts", "mlp.gate", "block_sparse_moe.experts")),
    "Qwen3MoeForCausalLM": replace(_LLAMA_LIKE, experts=ExpertNames("mlp.experts", "mlp.gate", "mlp.experts")),
    "Gemma3ForConditionalGeneration": _inside(_SCALED_BY_LINEARS),
    "Mistral3ForConditionalGeneration": _inside(_LLAMA_LIKE),
    "Qwen2_5_VLForConditionalGeneration": _inside(_LLAMA_LIKE),
}


def factor_entries(m: int, n: int, rank: int, structure: Stored) -> int:
    """Count the entries of the factors of an (m, n) matrix.

    Two factors have r (m + n), an identity block r (m + n - r): what a matrix of rank r has degrees of freedom.
    """
    return rank * (m + n - (rank if structure == "identity_block" else 0))


@dataclass(frozen=True)
class Group:
    """One fused group of one decoder layer.

    `name` is the fused module's full name (`model.layers.0.self_attn.qkv_proj`), `members` the full names of its
    linears in stacking order, `out_features` their row counts; `biases` counts the biases that the dense linears
    already have (m or less).

    `stacked`: linears that lie one after the other in each member, where they give an MLP's neurons (`GroupNames.stacked`).

    `fed_by` is the group that gives its inputs where the two are allocated as one: an MLP whose neurons can be removed
    (`allocated`). Its parameters then count here.
    """

    name: str
    kind: str
    layer: int
    members: tuple[str, ...]
    out_features: tuple[int, ...]
    in_features: int
    biases: int = 0
    stacked: int = 1
    fed_by: Group | None = None

    @property
    def m(self) -> int:
        """Rows of the stacked weight."""
        return sum(self.out_features)

    @property
    def n(self) -> int:
        """Columns of the stacked weight: the width of the shared input."""
        return self.in_features

    @property
    def neurons(self) -> int:
        """Neurons of the MLP, of a group that gives them."""
        return self.out_features[0] // self.stacked

    @property
    def rows_per_neuron(self) -> int:
        """Rows of the stacked weight for each of them: 2 of gate and up, 1 of a plain MLP."""
        return self.m // self.neurons

    @property
    def dense_parameters(self) -> int:
        """Parameters of the dense linears, biases included."""
        return self.m * self.n + self.biases + (self.fed_by.dense_parameters if self.fed_by else 0)

    def stored_as(self, structure: Structure) -> Stored:
        """Return what a plan of that structure makes of this group."""
        if structure == "narrow":
            return "narrow_in" if self.fed_by else "low_rank"
        return structure

    def error_index(self, level: Level) -> int:
        """Return the place of a level in a tensor of errors (`SpectrumStore.errors`): its rank."""
        return self.full_rank if level.rank is None else level.rank

    def parameters(self, rank: int | None, stored: Stored) -> int:
        """Parameters stored for this group; the dense linears' for `None`.

        Those of the factors plus m for the bias b. `narrow_out`: of `rank` rows of each member. `narrow_in`: of `rank` columns
        and b, and of `fed_by` with as many rows.
        """
        if rank is None or stored == "dense":
            return self.dense_parameters
        if stored == "narrow_out":
            return self.dense_parameters // self.neurons * rank
        if stored == "narrow_in":
            return self.m * rank + self.m + (self.fed_by.parameters(rank, "narrow_out") if self.fed_by else 0)
        return factor_entries(self.m, self.n, rank, stored) + self.m

    def bias_entries(self, rank: int | None, stored: Stored) -> int:
        """Count those of `parameters` that are added, not multiplied by."""
        if rank is None or stored == "dense":
            return self.biases + (self.fed_by.biases if self.fed_by else 0)
        if stored == "narrow_out":
            return self.biases // self.neurons * rank
        return self.m + (self.fed_by.bias_entries(rank, "narrow_out") if self.fed_by else 0)

    def matrices(self, rank: int | None, stored: Stored) -> list[tuple[int, int]]:
        """List the shapes of the weight matrices that are stored for this group, those of `fed_by` last."""
        kept, feeding = (self.n if rank is None else rank), []
        if self.fed_by:
            feeding = [(self.fed_by.rows_per_neuron * kept, self.fed_by.n)]
        if stored == "narrow_in" or rank is None:
            return [(self.m, kept), *feeding]
        return [(rank, self.n - (rank if stored == "identity_block" else 0)), (self.m, rank)]

    def can_round(self, rank: int | None, weights: Precision, stored: Stored) -> bool:
        """Whether those matrices can be rounded so: factors to 8 bits only, and groups of inputs must fit."""
        scheme = SCHEMES[weights]
        whole = rank is None or stored == "narrow_in"
        return (whole or scheme.bits == 8) and all(scheme.fits(n) for _, n in self.matrices(rank, stored))

    def stored_bytes(self, level: Level, stored: Stored, itemsize: int) -> int:
        """Count the bytes of this group's tensors at a level; values that are not rounded have `itemsize` bytes."""
        if level.weights is None:
            return self.parameters(level.rank, stored) * itemsize
        scheme, r = SCHEMES[level.weights], level.residual
        rounded = sum(scheme.stored_bytes(m, n) + r * (m + n + 4) for m, n in self.matrices(level.rank, stored))
        return rounded + self.bias_entries(level.rank, stored) * itemsize

    @property
    def ordered(self) -> bool:
        """Whether its inputs can be made to arrive in any order (`ORDERED`)."""
        return self.kind in ORDERED

    @property
    def full_rank(self) -> int:
        """Largest rank that the stacked weight can have; of an MLP whose neurons are removed, their number."""
        return self.n if self.fed_by else min(self.m, self.n)


@dataclass(frozen=True)
class Mixture(Group):
    """The experts of one decoder layer: gated MLPs of `n` neurons and `m` outputs. The router chooses `active` of them for a token.

    A plan removes experts, or leaves each of them fewer neurons. A rank is the number of neurons that all experts keep together.
    `members` is the module of the experts in transformers, and `router` that of their router, which is not counted here.
    """

    experts: int = 0
    active: int = 0
    router: str = ""

    @property
    def dense_parameters(self) -> int:
        """Parameters of all experts."""
        return self.parameters(self.full_rank, "experts")

    @property
    def full_rank(self) -> int:
        """Neurons of all experts."""
        return self.experts * self.n

    def stored_as(self, structure: Structure) -> Stored:
        """Return what a plan of any structure makes of it."""
        return "experts"

    def parameters(self, rank: int | None, stored: Stored) -> int:
        """Parameters of `rank` neurons: of each a row of gate, a row of up and a column of down."""
        return 3 * self.m * (self.full_rank if rank is None else rank)

    def bias_entries(self, rank: int | None, stored: Stored) -> int:
        """Return 0: there are no biases."""
        return 0

    def can_round(self, rank: int | None, weights: Precision, stored: Stored) -> bool:
        """Return False: experts are not rounded."""
        return False

    def fewer(self, experts: int) -> Level:
        """Return the level at which so many experts stay."""
        return Level(experts * self.n, experts=experts)

    def narrower(self, neurons: int) -> Level:
        """Return the level at which every expert keeps so many neurons."""
        return Level(self.experts * neurons)

    def sizes(self, level: Level) -> tuple[int, int]:
        """Return the number of experts at a level, and the neurons of each."""
        experts = level.experts or self.experts
        return experts, self.n if level.rank is None else level.rank // experts

    def levels(self, step: int) -> list[Level]:
        """List the levels below dense.

        They are numbers of experts, no smaller than what the router chooses, and multiples of `step` as numbers of neurons of each:
        at most `_EXPERT_LEVELS` of both, evenly spread.
        """
        counts, widths = range(self.active, self.experts), range(step, self.n, step)
        return [make(size) for make, sizes in ((self.fewer, counts), (self.narrower, widths)) for size in _spread(sizes)]

    def error_index(self, level: Level) -> int:
        """Return the place of a level in a tensor of errors: the number of experts or, behind those, of the neurons of each."""
        experts, neurons = self.sizes(level)
        return experts if level.experts or level.rank is None else self.experts + 1 + neurons


def _spread(sizes: range) -> range:
    return sizes[:: max(1, math.ceil(len(sizes) / _EXPERT_LEVELS))]


def allocated(groups: Sequence[Group], structure: Structure) -> list[Group]:
    """List what a plan of that structure decides on: the groups, or with `narrow` attention's groups and each MLP as one.

    Mixtures of experts are units of every structure.
    """
    if structure != "narrow":
        return list(groups)
    feeding = {(group.layer, group.kind): group for group in groups if group.kind in ORDERED.values()}
    return [
        replace(group, fed_by=feeding[group.layer, ORDERED[group.kind]]) if group.ordered else group
        for group in groups
        if (group.layer, group.kind) not in feeding
    ]


def separate(groups: Sequence[Group]) -> list[tuple[Group, Group]]:
    """Take fused groups apart into groups of one linear, each beside the fused group it came from.

    For plans that factorize q, k, v, gate and up on their own, as the papers do; its kind is the linear's name without
    `_proj` (`q`). The engine then multiplies once more for each (`plugins/vllm/layers.py`).
    """
    return [
        (
            Group(
                name=member,
                kind=member.rpartition(".")[2].removesuffix("_proj"),
                layer=group.layer,
                members=(member,),
                out_features=(m,),
                in_features=group.in_features,
                biases=m if group.biases and group.biases == group.m else 0,
            ),
            group,
        )
        for group in groups
        for member, m in zip(group.members, group.out_features, strict=True)
    ]


def as_listed(groups: Sequence[Group], names: Container[str]) -> list[Group]:
    """Take those fused groups apart of whose linears some are in `names`, the names of an artifact's groups."""
    listed: list[Group] = []
    for group in groups:
        alone = len(group.members) > 1 and any(member in names for member in group.members)
        listed += [single for single, _ in separate([group])] if alone else [group]
    return listed


def family_of(config: Any) -> Family:
    """Return the family of a transformers config.

    Raises:
        UnsupportedModelError: for an architecture that is not in `FAMILIES`, by its name.
    """
    names = list(getattr(config, "architectures", None) or [])
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    found = ", ".join(names)[:100] or f"model_type {getattr(config, 'model_type', None)!r} without an 'architectures' entry"
    raise UnsupportedModelError(
        f"unsupported architecture: {found}. lrserve factorizes {', '.join(FAMILIES)}; "
        "convert the model to one of these or open an issue with its config.json"
    )


def is_dense(module: object) -> TypeGuard[nn.Linear]:
    """Say whether a module is a dense linear layer.

    A subclass with a forward of its own (compressed, quantized, adapted) is not the plain product that its weight suggests.
    """
    from torch import nn

    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def find_mixtures(model: Any) -> list[Mixture]:
    """List the mixtures of experts of a dense causal LM in layer order; the model may live on the meta device.

    Raises:
        UnsupportedModelError: unknown architecture.
    """
    family = family_of(model.config)
    found: list[Mixture] = []
    for index, layer in enumerate(model.get_submodule(family.layers).children()):
        experts = family.experts_in(layer)
        if family.experts is None or experts is None:
            continue
        prefix = f"{family.layers}.{index}."
        count, hidden, width = experts.get_parameter("down_proj").shape
        found.append(
            Mixture(
                name=prefix + family.experts.fused,
                kind="experts",
                layer=index,
                members=(prefix + family.experts.experts,),
                out_features=(hidden,),
                in_features=width,
                experts=count,
                active=int(model.config.num_experts_per_tok),
                router=prefix + family.experts.router,
            )
        )
    return found


def find_units(model: Any) -> list[Group]:
    """List the fused groups and the mixtures of experts of a dense causal LM in layer order (`find_groups`, `find_mixtures`)."""
    return sorted([*find_groups(model), *find_mixtures(model)], key=lambda group: group.layer)


def find_groups(model: nn.Module) -> list[Group]:
    """List every fused group of a dense causal LM in layer order; the model may live on the meta device.

    Raises:
        UnsupportedModelError: unknown architecture, or a layer without the linears that its family promises.
    """
    from torch import nn

    family = family_of(model.config)
    groups: list[Group] = []
    layers = model.get_submodule(family.layers)
    if not isinstance(layers, nn.ModuleList):
        raise UnsupportedModelError(f"{family.layers} is a {type(layers).__name__}, not a list of decoder layers")
    for index in range(len(layers)):
        prefix = f"{family.layers}.{index}."
        for kind, names in family.groups_in(layers[index]).items():
            linears = []
            for member in names.members:
                try:
                    linear = model.get_submodule(prefix + member)
                except AttributeError:
                    linear = None
                if not is_dense(linear):
                    kind_found = "nothing" if linear is None else type(linear).__name__
                    raise UnsupportedModelError(
                        f"expected a linear layer at {prefix + member}, found {kind_found}; "
                        "give lrserve the dense checkpoint, before quantization, adapters or compression"
                    )
                linears.append(linear)
            groups.append(
                Group(
                    name=prefix + names.fused,
                    kind=kind,
                    layer=index,
                    members=tuple(prefix + member for member in names.members),
                    out_features=tuple(linear.out_features for linear in linears),
                    in_features=linears[0].in_features,
                    biases=sum(linear.out_features for linear in linears if linear.bias is not None),
                    stacked=names.stacked,
                )
            )
    return groups
