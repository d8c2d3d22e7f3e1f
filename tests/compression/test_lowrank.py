"""Groups, spectra on disk, and the low-rank layer inside models."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from tiny import FACTORED, FAMILIES_TESTED, VOCABULARY, WITH_MLPS, dense_model, factorized_model, groups_in, levels_of

from lrserve.allocation.plan import Plan
from lrserve.compression.assemble import MergedLevels, compress_model
from lrserve.compression.calibrate import calibrate
from lrserve.compression.factorize import Factors, factorize
from lrserve.compression.groups import FAMILIES, STRUCTURES, Group, Structure, allocated, family_of, find_groups
from lrserve.compression.layers import IdentityBlock, LowRankLinear, first_factor
from lrserve.compression.level import DENSE, Level
from lrserve.compression.lowrank import install_low_rank, load_factors
from lrserve.compression.spec import GroupSpec, is_permutation, parse_groups, quantization_config, specs_of
from lrserve.compression.spectra import SpectrumStore, features, stacked_weight, write_spectra
from lrserve.compression.training import TrainedFactors
from lrserve.errors import ArtifactError, CalibrationError, UnsupportedModelError


def tokens() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=FAMILIES_TESTED)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


StoreOf = Callable[[str, Structure], SpectrumStore]


@pytest.fixture(scope="module")
def store_of(tmp_path_factory: pytest.TempPathFactory) -> StoreOf:
    """The spectra of a tiny model, made once for each architecture and structure."""

    @cache
    def make(architecture: str, structure: Structure) -> SpectrumStore:
        folder, model = tmp_path_factory.mktemp("store"), dense_model(architecture)
        groups = find_groups(model)
        calibrate(model, groups, tokens(), folder / "statistics", pool_sequences=8, batch_tokens=48)
        units = allocated(groups, structure)
        write_spectra(model, units, features(folder / "statistics"), folder / "spectra")
        return SpectrumStore(folder / "spectra", units, folder / "statistics")

    return make


def test_groups_count_the_linears_parameters(architecture: str) -> None:
    model = dense_model(architecture)
    groups = find_groups(model)
    assert [group.kind for group in groups] == [*groups_in(architecture)] * 2
    layers = model.get_submodule(FAMILIES[architecture].layers)
    linears = [module for module in layers.modules() if isinstance(module, torch.nn.Linear)]
    assert sum(group.dense_parameters for group in groups) == sum(p.numel() for linear in linears for p in linear.parameters())


@pytest.mark.parametrize("structure", ["low_rank", "narrow"])
def test_full_rank_changes_nothing(structure: Structure, architecture: str, store_of: StoreOf) -> None:
    store = store_of(architecture, structure)
    ranks = [(group, group.full_rank) for group in store.groups.values()]
    dense = dense_model(architecture)
    compressed = compress_model(dense_model(architecture), levels_of(ranks), structure, store, torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(compressed(tokens()).logits, dense(tokens()).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_merged_ranks_equal_the_installed_factors_and_restore(structure: Structure, architecture: str, store_of: StoreOf) -> None:
    store = store_of(architecture, structure)
    groups = list(store.groups.values())
    ranks = {group.name: 16 if group.kind in ("qkv", "down") else None for group in groups}
    chosen = [(group, rank) for group in groups if (rank := ranks[group.name]) is not None]
    compressed = compress_model(dense_model(architecture), levels_of(chosen), structure, store, torch.float32)
    model = dense_model(architecture)
    merged = MergedLevels(model, groups, store)
    with torch.inference_mode():
        before = model(tokens()).logits
        merged.apply({group.name: Level(8) for group in groups})
        merged.apply(dict.fromkeys(ranks, DENSE) | {group.name: Level(rank) for group, rank in chosen})
        torch.testing.assert_close(model(tokens()).logits, compressed(tokens()).logits, rtol=1e-3, atol=1e-3)
        assert (model(tokens()).logits - before).abs().max() > 0.01
        merged.apply({})
        assert torch.equal(model(tokens()).logits, before)


@torch.no_grad()
def test_features_beat_the_weights_own_svd_on_the_outputs(store_of: StoreOf) -> None:
    store = store_of("LlamaForCausalLM", "low_rank")
    model = dense_model("LlamaForCausalLM")
    groups = list(store.groups.values())
    hidden: list[torch.Tensor] = []
    group = groups[0]
    model.get_submodule(group.members[0]).register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0].flatten(0, 1)))
    model(tokens())
    x = hidden[0]
    W, _ = stacked_weight(model, group)
    plain = factorize(W, torch.eye(group.n), torch.zeros(group.n)).cut(8)

    def error(factors: Factors) -> float:
        return float((x.double() @ W.T.double() - (x.double() @ factors.merged().T.double() + factors.b)).square().sum())

    assert error(store.cut(group.name, 8)) < 0.9 * error(plain)


@pytest.mark.parametrize("structure", FACTORED)
def test_the_shared_factor_is_stored_once_in_the_promised_number_of_parameters(structure: Structure) -> None:
    model = dense_model("LlamaForCausalLM")
    groups = [group for group in find_groups(model) if group.layer == 0]
    dense = sum(parameter.numel() for parameter in model.parameters())
    install_low_rank(model, specs_of([(group, Level(4)) for group in groups], structure))
    names = [name for name in model.state_dict() if "layers.0" in name and ".A." in name]
    block = structure == "identity_block"
    assert sorted(names) == [
        f"model.layers.0.{group}.{tensor}"
        for group in ("mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj")
        for tensor in ("A.order", "A.weight")
        if tensor == "A.weight" or (block and group != "mlp.down_proj")  # whose inputs come in order
    ]
    change = sum(group.parameters(4, group.stored_as(structure)) - group.dense_parameters for group in groups)
    assert sum(parameter.numel() for parameter in model.parameters()) == dense + change
    attention = model.get_submodule("model.layers.0.self_attn")
    assert attention.q_proj.first is attention.v_proj.first
    assert isinstance(attention.q_proj, LowRankLinear)


@pytest.mark.parametrize("architecture", WITH_MLPS)
def test_an_mlp_with_fewer_neurons_is_smaller_dense_layers(architecture: str, store_of: StoreOf) -> None:
    store = store_of(architecture, "narrow")
    units = list(store.groups.values())
    ranks = [(unit, 24) for unit in units if unit.kind == "down" and unit.layer == 1]
    dense = dense_model(architecture)
    compressed = compress_model(dense_model(architecture), levels_of(ranks), "narrow", store, torch.float32)
    feeding, down = ranks[0][0].fed_by, compressed.get_submodule(ranks[0][0].name)
    assert feeding is not None
    assert {name: tuple(tensor.shape) for name, tensor in down.named_parameters()} == {
        "B.weight": (down.out_features, 24),
        "B.bias": (down.out_features,),
    }
    kept = [compressed.get_submodule(member) for member in feeding.members]
    assert [tuple(linear.weight.shape) for linear in kept] == [(24 * feeding.stacked, feeding.n)] * len(kept)
    whole, left = (
        W.view(feeding.rows_per_neuron, -1, feeding.n) for W in (stacked_weight(m, feeding)[0] for m in (dense, compressed))
    )
    neurons = [int((whole[0] == row).all(-1).nonzero()) for row in left[0]]
    assert torch.equal(left, whole[:, neurons]), "the same neurons of each linear"
    plan = Plan.of_ranks({unit.name: 24 if unit.name == ranks[0][0].name else None for unit in units}, "narrow")
    change = plan.parameters(units) - sum(unit.dense_parameters for unit in units)
    assert sum(p.numel() for p in compressed.parameters()) - sum(p.numel() for p in dense.parameters()) == change


@pytest.mark.parametrize("ordered", [False, True])
def test_an_identity_block_is_its_merged_weight(ordered: bool) -> None:
    n, rank = 12, 5
    first = first_factor(GroupSpec(rank, ("down_proj",), "identity_block", ordered), n)
    assert isinstance(first, IdentityBlock)
    torch.nn.init.normal_(first.weight)
    order = torch.arange(n, dtype=torch.int32)
    if first.order is not None:
        order = first.order.copy_(torch.randperm(n, generator=torch.Generator().manual_seed(0)))
    block = Factors(A=first.weight.detach(), B=torch.eye(rank), b=torch.zeros(rank), order=order)
    for shape in ((n,), (3, n), (2, 3, n)):
        x = torch.randn(shape)
        torch.testing.assert_close(first(x), x @ block.merged().T)
    stored = {name: tensor.dtype for name, tensor in first.bfloat16().state_dict().items()}
    assert stored == {"weight": torch.bfloat16} | ({} if ordered else {"order": torch.int32})


@pytest.mark.parametrize("architecture", WITH_MLPS)
@pytest.mark.parametrize("kinds", [("down",), ("gate_up", "down")])
def test_reordered_neurons_compute_what_the_dense_ones_do(architecture: str, kinds: tuple[str, ...]) -> None:
    """`down` first, so that it is loaded before the layer whose outputs it wants reordered."""
    groups = [group for group in reversed(find_groups(dense_model(architecture))) if group.kind in kinds]
    generator = torch.Generator().manual_seed(0)

    def factors(group: Group) -> Factors:
        A, B = (torch.randn(shape, generator=generator) * 0.1 for shape in ((16, group.n), (group.m, 16)))
        return Factors(A=A, B=B, b=torch.randn(group.m, generator=generator) * 0.1)

    source = TrainedFactors({group.name: factors(group) for group in groups})
    ranks = [(group, 16) for group in groups]
    inputs = torch.arange(24)[None]
    logits, models = [], []
    for structure in FACTORED:
        models.append(compress_model(dense_model(architecture).double(), levels_of(ranks), structure, source, torch.float64))
        down = [models[-1].get_submodule(group.name) for group in groups if group.kind == "down"]
        assert [layer.ordered for layer in down] == [structure == "identity_block"] * 2
        with torch.inference_mode():
            logits.append(models[-1](inputs).logits)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)  # rotary embeddings stay float32
    feeding = next(group for group in find_groups(dense_model(architecture)) if group.kind == "gate_up" and group.layer == 1)
    for member in feeding.members:
        for parameter in ("B.bias", "B.weight") if "gate_up" in kinds else ("weight",):
            reordered, rows = (model.get_parameter(f"{member}.{parameter}") for model in models)
            assert not torch.equal(reordered, rows)


def test_what_a_permutation_is() -> None:
    assert is_permutation(torch.tensor([2, 0, 1], dtype=torch.int32))
    for order in ([0, 0, 1], [1, 2, 3], [-1, 0, 1], [0, 1, 3]):
        assert not is_permutation(torch.tensor(order, dtype=torch.int32))
    assert not is_permutation(torch.tensor([2, 0, 1]))
    assert not is_permutation(torch.tensor([2.0, 0.0, 1.0]))


def test_factors_of_the_other_structure_are_not_loaded() -> None:
    model = factorized_model("LlamaForCausalLM", structure="identity_block")
    group = find_groups(dense_model("LlamaForCausalLM"))[1]
    T = torch.zeros_like(model.get_submodule(group.name).first.weight)
    with pytest.raises(TypeError, match="is an identity block, the factors are not"):
        load_factors(model, group, Factors(A=T, B=torch.zeros(group.m, len(T)), b=torch.zeros(group.m)))


def test_factors_that_overflow_their_dtype_are_refused() -> None:
    model = dense_model("LlamaForCausalLM")
    group = find_groups(model)[1]
    install_low_rank(model, specs_of([(group, Level(4))], "low_rank"))
    factors = Factors(A=torch.full((4, group.n), 1e6), B=torch.zeros(group.m, 4), b=torch.zeros(group.m))
    with pytest.raises(CalibrationError, match="not finite in torch.float16"):
        load_factors(model, group, factors, torch.float16)


def test_config_round_trip_and_what_is_refused() -> None:
    groups = find_groups(dense_model("LlamaForCausalLM"))
    specs = specs_of([(group, Level(8)) for group in groups[:4]], "low_rank") | specs_of(
        [(group, Level(8)) for group in groups[4:]], "identity_block"
    )
    config = quantization_config(specs)
    assert parse_groups(config) == specs
    name = groups[0].name
    for broken, message in [
        ({**config, "format_version": 3}, "format_version is 3"),
        ({**config, "groups": None}, "groups is missing"),
        ({**config, "groups": {name: {"structure": "magic", "rank": 8, "members": ["q"]}}}, "unknown structure 'magic'"),
        ({**config, "groups": {name: {"structure": "low_rank", "rank": 0, "members": ["q"]}}}, "rank 0"),
        ({**config, "groups": {name: {"structure": "low_rank", "rank": 8, "members": []}}}, "members"),
        (
            {**config, "groups": {name: {"structure": "low_rank", "rank": 8, "members": ["q"], "ordered": True}}},
            "ordered True in config.json does not fit the structure low_rank",
        ),
        ({**config, "groups": {name: {"structure": "identity_block", "rank": 8, "members": ["q"], "ordered": 1}}}, "ordered 1"),
    ]:
        with pytest.raises(ArtifactError, match=message):
            parse_groups(broken)
    mlp = allocated(groups, "narrow")[2]
    halves = specs_of([(mlp, Level(8))], "narrow")
    assert parse_groups(quantization_config(halves)) == halves
    for name, spec in halves.items():
        with pytest.raises(
            ArtifactError, match=rf"mlp: config.json removes neurons from one half of it only \(8 in {spec.structure}"
        ):
            parse_groups(quantization_config({name: spec}))
    alone = {f"model.layers.0.mlp.{name}": GroupSpec(8, (name,), "narrow_out") for name in ("gate_proj", "up_proj")}
    with pytest.raises(ArtifactError, match=r"gate_proj: config.json removes neurons from a part of an MLP only"):
        parse_groups(quantization_config({**halves, **alone}))
    twice = specs_of([(groups[0], Level(8))], "low_rank") | {groups[0].members[1]: GroupSpec(8, ("k_proj",))}
    with pytest.raises(ArtifactError, match=r"qkv_proj: config.json lists its member k_proj alone as well"):
        parse_groups(quantization_config(twice))
    with pytest.raises(ArtifactError, match="97 of 96 neurons cannot be kept"):
        install_low_rank(dense_model("LlamaForCausalLM"), specs_of([(mlp, Level(97))], "narrow"))
    with pytest.raises(ArtifactError, match="does not have"):
        install_low_rank(dense_model("LlamaForCausalLM"), specs_of([(groups[0], Level(8))], "low_rank"), prefix="model.layers.")
    with pytest.raises(ArtifactError, match="an identity block of rank 64 leaves nothing of 64 inputs"):
        install_low_rank(dense_model("LlamaForCausalLM"), specs_of([(groups[0], Level(64))], "identity_block"))


def test_an_unknown_architecture_is_refused_by_name() -> None:
    class Config:
        architectures = ("FalconForCausalLM",)

    with pytest.raises(UnsupportedModelError, match="unsupported architecture: FalconForCausalLM.*LlamaForCausalLM"):
        family_of(Config())
