"""The factorized layer's slicing and checks, one rank at a time and without an engine."""

from __future__ import annotations

import gc
import sys
import warnings
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import FACTORED, random_residual
from torch import nn

from lrserve.allocation.speed import Shape
from lrserve.compression.factorize import Factors
from lrserve.compression.groups import Group, Stored
from lrserve.compression.layers import Factor as LinearFactor
from lrserve.compression.level import Precision
from lrserve.compression.quantize import Rounded, round_to_nearest
from lrserve.compression.spec import GroupSpec
from lrserve.errors import ArtifactError, EngineError

pytestmark = pytest.mark.engine

N, RANK, HEAD, HEADS, KV_HEADS = 32, 8, 16, 8, 2
QKV = GroupSpec(rank=RANK, members=("q_proj", "k_proj", "v_proj"))
DOWN = GroupSpec(rank=RANK, members=("down_proj",))


def bare(layer_class: str, **attributes: Any) -> Any:
    """A vLLM layer without its constructor, which wants process groups."""
    from vllm.model_executor.layers import linear

    kind = getattr(linear, layer_class)
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    for name, value in {"disable_tp": False, **attributes}.items():
        setattr(layer, name, value)
    layer.register_parameter("bias", None)
    return layer


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one group as they stand in an artifact, and what they compute; an ordered identity block has no `order`."""

    structure: Stored
    a: torch.Tensor
    order: torch.Tensor | None
    b: list[torch.Tensor]
    bias: list[torch.Tensor]

    def dense(self, index: int) -> torch.Tensor:
        """Member `index` as one weight (m, n)."""
        order = torch.arange(N) if self.order is None and self.structure == "identity_block" else self.order
        return Factors(self.a, self.b[index], self.bias[index], order).merged()

    def compute(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x @ self.dense(index).T + bias for index, bias in enumerate(self.bias)]

    def load_first(self, layer: Any, order_first: bool = False) -> None:
        parts = [(layer.A.weight, self.a)]
        if self.order is not None:
            parts.insert(0 if order_first else 1, (layer.A.order, self.order))
        for parameter, tensor in parts:
            transient = tensor.clone()
            parameter.weight_loader(parameter, transient)
            transient.zero_()  # as a streaming loader does with its buffer

    def load(self, layer: Any, order_first: bool = False) -> None:
        self.load_first(layer, order_first)
        for shard, rows, offsets in zip("qkv" if len(self.b) == 3 else [None], self.b, self.bias, strict=True):
            layer.B.weight.weight_loader(layer.B.weight, rows, shard)
            layer.B.bias.weight_loader(layer.B.bias, offsets, shard)


def checkpoint(structure: Stored, sizes: list[int], *, ordered: bool = False) -> Checkpoint:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    block = structure == "identity_block"
    return Checkpoint(
        structure=structure,
        a=random(RANK, N - RANK if block else N),
        order=torch.randperm(N, generator=generator, dtype=torch.int32) if block and not ordered else None,
        b=[random(m, RANK) for m in sizes],
        bias=[random(m) for m in sizes],
    )


def qkv_layer(
    structure: Stored, tp_size: int, tp_rank: int, dtype: torch.dtype = torch.float32, spec: GroupSpec = QKV
) -> tuple[Any, Any]:
    from lrserve.plugins.vllm.layers import LowRankLinearMethod

    replicas = max(1, tp_size // KV_HEADS)
    layer = bare("QKVParallelLinear", tp_size=tp_size, tp_rank=tp_rank, num_kv_head_replicas=replicas)
    method = LowRankLinearMethod("layers.0.qkv_proj", replace(spec, structure=structure))
    sizes = [HEADS // tp_size * HEAD, *([max(1, KV_HEADS // tp_size) * HEAD] * 2)]
    method.create_weights(layer, N, sizes, N, sum(sizes) * tp_size, dtype)
    return layer, method


def down_layer(structure: Stored, tp_size: int, tp_rank: int, *, ordered: bool = False, **attributes: Any) -> tuple[Any, Any]:
    from lrserve.plugins.vllm.layers import LowRankLinearMethod

    layer = bare("RowParallelLinear", tp_size=tp_size, tp_rank=tp_rank, **{"reduce_results": True, **attributes})
    method = LowRankLinearMethod("layers.0.down_proj", replace(DOWN, structure=structure, ordered=ordered))
    method.create_weights(layer, N // tp_size, [24], N, 24, torch.float32)
    return layer, method


@dataclass(frozen=True)
class Apart:
    """q, k and v of a checkpoint one by one: each with factors of its own, or dense (`own` is None)."""

    own: list[Checkpoint | None]
    W: list[torch.Tensor]
    bias: list[torch.Tensor]
    """Of the dense."""

    def compute(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x @ W.T + b if own is None else own.compute(x)[0] for own, W, b in zip(self.own, self.W, self.bias, strict=True)]

    def load(self, layer: Any) -> None:
        for shard, own, W, b in zip("qkv", self.own, self.W, self.bias, strict=True):
            if own is None:
                layer.weight.weight_loader(layer.weight, W, shard)
                layer.weight_loader(layer.bias, b, shard)
                continue
            layer.A.weight.weight_loader(layer.A.weight, own.a.clone(), shard)
            if own.order is not None:
                layer.A.order.weight_loader(layer.A.order, own.order, shard)
            layer.B.weight.weight_loader(layer.B.weight, own.b[0], shard)
            layer.B.bias.weight_loader(layer.B.bias, own.bias[0], shard)


def checkpoint_apart() -> Apart:
    heads = [HEADS, KV_HEADS, KV_HEADS]
    torch.manual_seed(0)
    own = [checkpoint("low_rank", [HEADS * HEAD]), None, checkpoint("identity_block", [KV_HEADS * HEAD])]
    return Apart(own, [torch.randn(h * HEAD, N) for h in heads], [torch.randn(h * HEAD) for h in heads])


def apart_layer(whole: Apart, tp_size: int = 1, tp_rank: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    from lrserve.plugins.vllm.apart import PerShardMethod

    replicas = max(1, tp_size // KV_HEADS)
    layer = bare("QKVParallelLinear", tp_size=tp_size, tp_rank=tp_rank, num_kv_head_replicas=replicas)
    specs = [
        None if own is None else GroupSpec(RANK, (name,), own.structure) for name, own in zip(QKV.members, whole.own, strict=True)
    ]
    method = PerShardMethod("layers.0.qkv_proj", QKV.members, specs)
    sizes = [HEADS // tp_size * HEAD, *([max(1, KV_HEADS // tp_size) * HEAD] * 2)]
    method.create_weights(layer, N, sizes, N, sum(sizes) * tp_size, dtype)
    layer.bias = nn.Parameter(torch.full((sum(sizes),), float("nan"), dtype=dtype), requires_grad=False)
    return layer, method


def layer_of(whole: Checkpoint | Apart, tp_size: int = 1, tp_rank: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    if isinstance(whole, Apart):
        return apart_layer(whole, tp_size, tp_rank, dtype)
    return qkv_layer(whole.structure, tp_size, tp_rank, dtype)


@pytest.fixture(params=FACTORED)
def structure(request: pytest.FixtureRequest) -> Stored:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def qkv(structure: Stored) -> Checkpoint:
    return checkpoint(structure, [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD])


@pytest.fixture(params=[*FACTORED, "apart"])
def attention(request: pytest.FixtureRequest) -> Checkpoint | Apart:
    if request.param == "apart":
        return checkpoint_apart()
    return checkpoint(request.param, [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD])


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_column_parallel_ranks_hold_their_heads(tp_size: int, attention: Checkpoint | Apart) -> None:
    x = torch.randn(5, N)
    whole = attention.compute(x)
    for rank in range(tp_size):
        layer, method = layer_of(attention, tp_size, rank)
        attention.load(layer)
        method.process_weights_after_loading(layer)
        q_heads = HEADS // tp_size
        kv_heads = max(1, KV_HEADS // tp_size)
        kv_rank = rank // max(1, tp_size // KV_HEADS)
        expected = [
            whole[0][:, rank * q_heads * HEAD :][:, : q_heads * HEAD],
            *(part[:, kv_rank * kv_heads * HEAD :][:, : kv_heads * HEAD] for part in whole[1:]),
        ]
        assert torch.allclose(method.apply(layer, x), torch.cat(expected, dim=1), atol=1e-4)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_one_tensor_of_q_k_and_v_is_taken_apart(tp_size: int, qkv: Checkpoint) -> None:
    """As in Phi-3's checkpoints: each rank loads what it loads of three tensors."""
    for rank in range(tp_size):
        apart, _ = qkv_layer(qkv.structure, tp_size, rank)
        qkv.load(apart)
        whole, method = qkv_layer(qkv.structure, tp_size, rank, spec=GroupSpec(RANK, ("qkv_proj",)))
        qkv.load_first(whole)
        whole.B.weight.weight_loader(whole.B.weight, torch.cat(qkv.b))
        with pytest.raises(ArtifactError, match=r"missing from the checkpoint: layers\.0\.qkv_proj\.B\.bias\."):
            method.process_weights_after_loading(whole)
        whole.B.bias.weight_loader(whole.B.bias, torch.cat(qkv.bias))
        for name, parameter in apart.named_parameters():
            assert torch.equal(whole.get_parameter(name), parameter)
        with pytest.raises(ArtifactError, match=r"qkv_proj\.B\.weight is \(32, 8\) in the checkpoint; .* \(192, 8\)"):
            whole.B.weight.weight_loader(whole.B.weight, qkv.b[1])


INPUTS_OF_DOWN = [("low_rank", False), ("identity_block", False), ("identity_block", True)]


@pytest.mark.parametrize("order_first", [True, False])
@pytest.mark.parametrize("reduce_results", [True, False])
@pytest.mark.parametrize(("structure", "ordered"), INPUTS_OF_DOWN)
def test_row_parallel_parts_sum_to_the_whole(
    structure: Stored, ordered: bool, reduce_results: bool, order_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lrserve.plugins.vllm.layers as module

    down, x = checkpoint(structure, [24], ordered=ordered), torch.randn(5, N)
    z = x @ replace(down, b=[torch.eye(RANK)], bias=[torch.zeros(RANK)]).dense(0).T
    partial: list[torch.Tensor] = []

    def all_reduce(part: torch.Tensor) -> torch.Tensor:
        partial.append(part)
        return z

    monkeypatch.setattr(module, "tensor_model_parallel_all_reduce", all_reduce)
    outputs = []
    for rank in range(2):
        layer, method = down_layer(structure, 2, rank, ordered=ordered, reduce_results=reduce_results)
        down.load(layer, order_first)
        method.process_weights_after_loading(layer)
        assert [name for name, _ in layer.A.named_parameters()] == ["weight"]
        assert not layer.reduce_results  # either summed between the factors, or by whoever asked for partial sums
        outputs.append(method.apply(layer, x[:, rank * 16 : (rank + 1) * 16].contiguous()))
    for result in outputs if reduce_results else [sum(outputs)]:
        assert torch.allclose(result, *down.compute(x), atol=1e-4)
    assert not reduce_results or torch.allclose(sum(partial), z, atol=1e-4)


@pytest.mark.parametrize("order_first", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
def test_row_parallel_alone_reorders_its_input_where_it_must(ordered: bool, order_first: bool) -> None:
    from lrserve.plugins.vllm.kernels import IdentityBlock

    down, x = checkpoint("identity_block", [24], ordered=ordered), torch.randn(5, N)
    layer, method = down_layer("identity_block", 1, 0, ordered=ordered)
    down.load(layer, order_first)
    method.process_weights_after_loading(layer)
    assert isinstance(layer.A, IdentityBlock)
    assert (layer.A.order is None) == ordered
    assert torch.allclose(method.apply(layer, x), *down.compute(x), atol=1e-4)


def narrow_down(tp_size: int, tp_rank: int) -> tuple[Any, Any]:
    from lrserve.plugins.vllm.layers import LowRankLinearMethod

    layer = bare("RowParallelLinear", tp_size=tp_size, tp_rank=tp_rank, reduce_results=True)
    method = LowRankLinearMethod("layers.0.down_proj", replace(DOWN, structure="narrow_in"))
    method.create_weights(layer, N // tp_size, [24], N, 24, torch.float32)
    return layer, method


def narrow_gate_up(tp_size: int, tp_rank: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    from vllm.model_executor import parameter

    from lrserve.plugins.vllm.layers import StockMethod

    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: tp_rank)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: tp_size)
    layer = bare("MergedColumnParallelLinear", tp_size=tp_size, tp_rank=tp_rank, output_sizes=[N, N])
    spec = GroupSpec(RANK, ("gate_proj", "up_proj"), "narrow_out")
    method = StockMethod("layers.0.gate_up_proj", spec)
    sizes = [N // tp_size] * 2
    method.create_weights(layer, 24, sizes, 24, 2 * N, torch.float32, weight_loader=layer.weight_loader)
    return layer, method


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_an_mlp_with_fewer_neurons_is_divided_among_the_ranks(tp_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up, B = (torch.randn(shape, generator=generator) for shape in ((RANK, 24), (RANK, 24), (24, RANK)))
    b, x = torch.randn(24, generator=generator), torch.randn(5, 24, generator=generator)
    parts = []
    for rank in range(tp_size):
        first, first_method = narrow_gate_up(tp_size, rank, monkeypatch)
        second, second_method = narrow_down(tp_size, rank)
        first.weight.weight_loader(first.weight, gate, 0)
        first.weight.weight_loader(first.weight, up, 1)
        second.B.weight.weight_loader(second.B.weight, B)
        second.B.bias.weight_loader(second.B.bias, b)
        for layer, method in ((first, first_method), (second, second_method)):
            method.process_weights_after_loading(layer)
        assert second.reduce_results  # the outputs are summed, as of a dense layer
        g, u = first_method.apply(first, x).chunk(2, dim=-1)
        assert g.shape == (5, RANK // tp_size)
        parts.append(second_method.apply(second, (g.relu() * u).contiguous()))
    assert torch.allclose(sum(parts), ((x @ gate.T).relu() * (x @ up.T)) @ B.T + b, atol=1e-3)


def test_what_is_missing_of_a_narrow_mlp_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    first, first_method = narrow_gate_up(1, 0, monkeypatch)
    with pytest.raises(ArtifactError, match=r"up_proj\.weight is \(7, 24\) in the checkpoint; .* \(8, 24\)"):
        first.weight.weight_loader(first.weight, torch.zeros(7, 24), 1)
    first.weight.weight_loader(first.weight, torch.zeros(RANK, 24), 1)
    with pytest.raises(ArtifactError, match=r"missing from the checkpoint: layers\.0\.gate_proj\.weight\."):
        first_method.process_weights_after_loading(first)
    second, second_method = narrow_down(1, 0)
    second.B.weight.weight_loader(second.B.weight, torch.zeros(24, RANK))
    with pytest.raises(ArtifactError, match=r"missing from the checkpoint: layers\.0\.down_proj\.B\.bias\."):
        second_method.process_weights_after_loading(second)
    with pytest.raises(ArtifactError, match=r"down_proj\.B\.weight is \(24, 9\) in the checkpoint"):
        second.B.weight.weight_loader(second.B.weight, torch.zeros(24, RANK + 1))
    with pytest.raises(ArtifactError, match="8 neurons cannot be divided among 3 ranks"):
        narrow_down(3, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, N), (7, N), (2, 3, N), (0, N)])
def test_any_leading_shape_in_every_dtype(shape: tuple[int, ...], dtype: torch.dtype, attention: Checkpoint | Apart) -> None:
    layer, method = layer_of(attention, dtype=dtype)
    attention.load(layer)
    method.process_weights_after_loading(layer)
    x = torch.randn(shape).to(dtype)
    found = method.apply(layer, x)
    assert found.dtype == dtype
    expected = torch.cat(attention.compute(x.float()), dim=-1)
    assert found.shape == expected.shape
    bound = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert (found.float() - expected).norm() <= bound * expected.norm()


def test_the_layer_can_be_compiled_whole(attention: Checkpoint | Apart) -> None:
    layer, method = layer_of(attention)
    attention.load(layer)
    method.process_weights_after_loading(layer)
    compiled = torch.compile(lambda x: method.apply(layer, x), backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for tokens in (3, 8):
            x = torch.randn(tokens, N)
            before = x.clone()
            assert torch.allclose(compiled(x), torch.cat(attention.compute(x), dim=-1), atol=1e-4)
            assert torch.equal(x, before)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize(("structure", "ordered"), INPUTS_OF_DOWN)
def test_dummy_weights_leave_an_order_that_is_a_permutation(
    structure: Stored, ordered: bool, tp_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight

    import lrserve.plugins.vllm.layers as module

    config = SimpleNamespace(load_config=SimpleNamespace(load_format="dummy"), lora_config=None)
    monkeypatch.setattr(module, "get_current_vllm_config_or_none", lambda: config)
    monkeypatch.setattr(module, "tensor_model_parallel_all_reduce", lambda z: z)
    layer, method = down_layer(structure, tp_size, 0, ordered=ordered)
    for tensor in layer.state_dict().values():
        initialize_single_dummy_weight(tensor)
    method.process_weights_after_loading(layer)
    if structure == "identity_block" and tp_size == 1 and not ordered:
        assert layer.A.order.tolist() == list(range(N))
    y = method.apply(layer, torch.randn(5, N // tp_size))
    assert torch.isfinite(y).all()
    assert y.abs().max() < 1  # of the loader's small weights, not of memory that nobody wrote


def test_the_dense_layers_bias_is_not_added(attention: Checkpoint | Apart) -> None:
    layer, method = layer_of(attention)
    layer.bias = nn.Parameter(torch.full((sum(len(x) for x in attention.bias),), float("nan")), requires_grad=False)
    attention.load(layer)
    method.process_weights_after_loading(layer)
    x = torch.randn(3, N)
    assert torch.allclose(method.apply(layer, x, layer.bias), torch.cat(attention.compute(x), dim=1), atol=1e-4)
    assert not layer.bias.any()  # where skip_bias_add hands it out


def test_missing_factors_are_named(qkv: Checkpoint) -> None:
    layer, method = qkv_layer(qkv.structure, 1, 0)
    qkv.load_first(layer)
    layer.B.weight.weight_loader(layer.B.weight, qkv.b[0], "q")
    layer.B.bias.weight_loader(layer.B.bias, qkv.bias[0], "q")
    with pytest.raises(ArtifactError, match=r": layers\.0\.k_proj\.B\.weight, layers\.0\.k_proj\.B\.bias, layers\.0\.v_pr"):
        method.process_weights_after_loading(layer)


def test_what_is_missing_or_too_much_of_linears_apart_is_named() -> None:
    whole = checkpoint_apart()
    layer, _ = apart_layer(whole)
    a = layer.A
    for loader, tensor, shard, message in (
        (layer.weight.weight_loader, whole.W[0], "q", r"layers\.0\.q_proj: config.json says it is factorized"),
        (layer.B.weight.weight_loader, whole.W[1], "k", r"k_proj\.B\.weight is in the checkpoint, but config.json says that"),
        (layer.weight.weight_loader, whole.W[1][1:], "k", r"k_proj\.weight is \(31, 32\) in the checkpoint"),
        (a.order.weight_loader, torch.arange(N, dtype=torch.int32), "q", r"q_proj\.A\.order is .*config.json says low_rank"),
        (a.weight.weight_loader, whole.W[0], None, r"qkv_proj\.A\.weight is .*config.json lists its linears one by one"),
    ):
        with pytest.raises(ArtifactError, match=message):
            loader(None, tensor, shard)
    own = [whole.own[0], None, replace(whole.own[2], order=None)]
    layer, method = apart_layer(whole)
    replace(whole, own=own).load(layer)
    with pytest.raises(ArtifactError, match=r"missing from the checkpoint: layers\.0\.v_proj\.A\.order\."):
        method.process_weights_after_loading(layer)
    layer, method = apart_layer(whole)
    layer.A.weight.weight_loader(layer.A.weight, whole.own[0].a, "q")
    missing = "layers.0.q_proj.B.weight, layers.0.q_proj.B.bias, layers.0.k_proj.weight, layers.0.k_proj.bias, layers.0.v_proj.A.w"
    with pytest.raises(ArtifactError, match=f"missing from the checkpoint: {missing}"):
        method.process_weights_after_loading(layer)


def test_factors_of_single_linears_are_refused_where_they_are_listed_together(qkv: Checkpoint) -> None:
    layer, _ = qkv_layer(qkv.structure, 1, 0)
    with pytest.raises(ArtifactError, match=r"layers\.0\.k_proj\.A\.weight is .* lists q_proj, k_proj, v_proj as one group"):
        layer.A.weight.weight_loader(layer.A.weight, qkv.a, "k")


def test_nothing_that_was_loaded_stays_beside_its_packed_form(attention: Checkpoint | Apart) -> None:
    layer, method = layer_of(attention)
    loaded = weakref.ref(layer.A.weight)
    loaders = [layer.weight.weight_loader, layer.weight_loader]  # which vLLM keeps
    attention.load(layer)
    method.process_weights_after_loading(layer)
    gc.collect()
    assert loaders
    assert loaded() is None or loaded().numel() == 0


def test_gate_alone_beside_a_dense_up() -> None:
    from lrserve.plugins.vllm.apart import PerShardMethod

    gate, up = checkpoint("identity_block", [24]), torch.randn(24, N)
    parts = []
    for rank in range(2):
        layer = bare("MergedColumnParallelLinear", tp_size=2, tp_rank=rank, output_sizes=[24, 24])
        spec = GroupSpec(RANK, ("gate_proj",), "identity_block")
        method = PerShardMethod("mlp.gate_up_proj", ("gate_proj", "up_proj"), [spec, None])
        method.create_weights(layer, N, [12, 12], N, 48, torch.float32)
        layer.A.order.weight_loader(layer.A.order, gate.order, 0)
        layer.A.weight.weight_loader(layer.A.weight, gate.a, 0)
        layer.B.weight.weight_loader(layer.B.weight, gate.b[0], 0)
        layer.B.bias.weight_loader(layer.B.bias, gate.bias[0], 0)
        layer.weight.weight_loader(layer.weight, up, 1)
        method.process_weights_after_loading(layer)
        parts.append((layer, method))
    x = torch.randn(5, N)
    halves = [method.apply(layer, x).chunk(2, dim=-1) for layer, method in parts]
    assert torch.allclose(torch.cat([gate_half for gate_half, _ in halves], -1), *gate.compute(x), atol=1e-4)
    assert torch.allclose(torch.cat([up_half for _, up_half in halves], -1), x @ up.T, atol=1e-4)


@pytest.mark.parametrize("ordered", [True, False])
def test_lora_on_reordered_neurons_is_warned_of(ordered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import lrserve.plugins.vllm.layers as module

    config = SimpleNamespace(load_config=SimpleNamespace(load_format="auto"), lora_config=SimpleNamespace())
    monkeypatch.setattr(module, "get_current_vllm_config_or_none", lambda: config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        down_layer("identity_block", 1, 0, ordered=ordered)
    assert [str(warning.message) for warning in caught if "LoRA adapters" in str(warning.message)] == [module._REORDERED] * ordered


@pytest.mark.parametrize("tp_size", [1, 2])
def test_missing_order_is_named(tp_size: int) -> None:
    down = checkpoint("identity_block", [24])
    layer, method = down_layer("identity_block", tp_size, 0)
    replace(down, order=None).load(layer)
    with pytest.raises(ArtifactError, match=r"missing from the checkpoint: layers\.0\.down_proj\.A\.order\."):
        method.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.zeros(N, dtype=torch.int32), f"is no permutation of the {N} inputs"),
        (torch.arange(1, N + 1, dtype=torch.int32), f"is no permutation of the {N} inputs"),
        (torch.arange(N), f"is no permutation of the {N} inputs in int32"),
        (torch.arange(N - 1, dtype=torch.int32), rf"is \({N - 1},\) in the checkpoint"),
    ],
    ids=["repeated", "too-large", "int64", "short"],
)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_order_that_is_no_permutation_is_refused(tp_size: int, order: torch.Tensor, message: str) -> None:
    layer, _ = down_layer("identity_block", tp_size, 0)
    with pytest.raises(ArtifactError, match=rf"layers\.0\.down_proj\.A\.order {message}"):
        layer.A.order.weight_loader(layer.A.order, order)


def test_identity_block_that_leaves_nothing_is_refused() -> None:
    from lrserve.plugins.vllm.layers import LowRankLinearMethod

    layer = bare("RowParallelLinear", tp_size=1, tp_rank=0, reduce_results=True)
    method = LowRankLinearMethod("layers.0.down_proj", GroupSpec(N, ("down_proj",), "identity_block"))
    with pytest.raises(ArtifactError, match=rf"an identity block of rank {N} leaves nothing of {N} inputs"):
        method.create_weights(layer, N, [24], N, 24, torch.float32)


def test_on_a_gpu_the_engines_layers_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import VllmConfig

    from lrserve.engines.timing import replay_layers
    from lrserve.engines.vllm_latency import TIMERS, latency_table

    assert TIMERS["cuda"] is replay_layers
    runs: list[str] = []

    def bench(run: Callable[[], None], *, rep: float, return_mode: str) -> float:
        run()
        runs.append(return_mode)
        return 0.64

    monkeypatch.setitem(TIMERS, "cpu", replay_layers)
    monkeypatch.setitem(sys.modules, "triton.testing", SimpleNamespace(do_bench_cudagraph=bench))
    shapes = [Shape(64, 32, None), Shape(64, 32, 16, "low_rank")]
    table = latency_table([asdict(shape) for shape in shapes], [1, 4], torch.float32, None, VllmConfig())
    assert table == [pytest.approx([10.0] * 2)] * 2  # of 64 copies each
    assert runs == ["median"] * 4


def test_a_timed_layer_weighs_what_the_group_stores(structure: Stored) -> None:
    from lrserve.engines.timing import elements

    group = Group(name="g", kind="o", layer=0, members=("g",), out_features=(24,), in_features=N)
    for rank in (None, RANK):
        stored = group.parameters(rank, structure) - (0 if rank is None else group.m)  # the bias does not count
        assert elements(asdict(Shape(N, 24, rank, structure))) == stored


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (
            lambda layer: layer.A.weight.weight_loader(layer.A.weight, torch.zeros(RANK, N - 1)),
            r"qkv_proj\.A\.weight is",
        ),
        (
            lambda layer: layer.B.weight.weight_loader(layer.B.weight, torch.zeros(3, RANK), "k"),
            r"k_proj\.B\.weight is",
        ),
        (lambda layer: layer.B.bias.weight_loader(layer.B.bias, torch.zeros(3), "v"), r"v_proj\.B\.bias is \(3,\)"),
        (lambda layer: layer.weight.weight_loader(layer.weight, torch.zeros(4, N), "q"), "also has a dense tensor"),
        (lambda layer: layer.weight_loader(layer.weight, torch.zeros(4), "q"), "also has a dense tensor"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(load: Callable[[Any], None], message: str, structure: Stored) -> None:
    layer, _ = qkv_layer(structure, 1, 0)
    with pytest.raises(ArtifactError, match=message):
        load(layer)


def config_of(**groups: tuple[str, ...]) -> Any:
    from lrserve.plugins.vllm.config import LrserveConfig

    config = LrserveConfig({f"model.layers.0.{name}": GroupSpec(8, members) for name, members in groups.items()})
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return config


def test_groups_are_found_by_the_layers_name() -> None:
    config = config_of(qkv_proj=("q_proj", "k_proj", "v_proj"), o_proj=("o_proj",))
    assert [spec.rank for spec in config.groups_of("model.layers.0.qkv_proj")] == [8]
    assert [spec.rank for spec in config.groups_of("draft_model.model.layers.0.o_proj")] == [8]
    assert config.groups_of("model.layers.1.qkv_proj") == [None]
    alone = config_of(k_proj=("k_proj",)).groups_of("draft_model.model.layers.0.qkv_proj")
    assert alone == [None, GroupSpec(8, ("k_proj",)), None]


@pytest.mark.parametrize(
    "groups",
    [
        {"qkv_proj": ("q_proj", "k_proj")},
        {"qkv_proj": ("k_proj", "q_proj", "v_proj")},
        {"qkv_proj": ("qkv_proj",)},
    ],
)
def test_other_groupings_than_vllms_are_refused(groups: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(ArtifactError, match="vLLM multiplies q_proj, k_proj, v_proj as one"):
        config_of(**groups).groups_of("model.layers.0.qkv_proj")


def test_a_group_of_some_of_the_linears_that_vllm_multiplies_together_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"lists model\.layers\.0\.q_proj as low_rank of q_proj, k_proj, but vLLM multiplies"):
        config_of(q_proj=("q_proj", "k_proj")).groups_of("model.layers.0.qkv_proj")


def test_a_linear_of_a_fused_layer_is_not_rounded_alone() -> None:
    config = config_of(k_proj=("k_proj",))
    config.groups["model.layers.0.k_proj"] = GroupSpec(8, ("k_proj",), weights="int8")
    with pytest.raises(ArtifactError, match=r"k_proj as low_rank of k_proj in int8, but vLLM multiplies .* and not rounded"):
        config.groups_of("model.layers.0.qkv_proj")


def test_rounding_on_load_is_refused() -> None:
    from vllm.config.quantization import QuantizationConfigArgs
    from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig

    config = config_of()
    config.online_quantization_config = None
    asked = OnlineQuantizationConfig(QuantizationConfigArgs(linear="int8_per_channel_static"))
    with pytest.raises(EngineError, match=r"--quantization-config cannot round the weights .* Leave it out"):
        config.online_quantization_config = asked
    assert config.online_quantization_config is None  # or vLLM would replace our layers by its own


@pytest.mark.parametrize(
    ("weights", "scheme"),
    [("int8", "CompressedTensorsW8A8Int8"), ("int4_g64", "CompressedTensorsWNA16"), ("fp8", "CompressedTensorsW8A8Fp8")],
)
def test_vllm_chooses_the_scheme(weights: Precision, scheme: str) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config

    from lrserve.plugins.vllm.schemes import InFloat32, scheme_for

    config = VllmConfig()
    config.model_config = SimpleNamespace(dtype=torch.bfloat16)
    with set_current_vllm_config(config):
        assert type(scheme_for(nn.Module(), weights, "layers.0.o_proj", torch.bfloat16)).__name__ == scheme
        found = scheme_for(nn.Module(), weights, "layers.0.o_proj", torch.float32)
    assert isinstance(found, InFloat32)


def rounded_layer(spec: GroupSpec, n: int, m: int, ranks: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A row-parallel layer of one rank, in float32."""
    from vllm.model_executor import parameter

    from lrserve.plugins.vllm.layers import LowRankLinearMethod, StockMethod

    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: ranks)
    layer = bare("RowParallelLinear", tp_size=ranks, tp_rank=rank, reduce_results=False)
    method = (StockMethod if spec.structure == "dense" else LowRankLinearMethod)("layers.0.down_proj", spec)
    method.create_weights(layer, n // ranks, [m], n, m, torch.float32, weight_loader=layer.weight_loader)
    return layer, method


def load_by_name(layer: Any, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        parameter = layer.get_parameter(name)
        parameter.weight_loader(parameter, tensor)


def stored(prefix: str, rounded: Rounded) -> dict[str, torch.Tensor]:
    """A rounded weight's tensors, as an artifact has them."""
    matrix = LinearFactor(rounded.values.shape[1], rounded.values.shape[0], bias=False)
    matrix.put(rounded)
    return {f"{prefix}{name}": tensor for name, tensor in matrix.state_dict().items()}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("structure", ["dense", "low_rank", "narrow_in"])
def test_row_parallel_ranks_hold_whole_groups(structure: Stored, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    n, m, rank = 128, 64, 32
    torch.manual_seed(0)
    x, b = torch.randn(5, n), torch.randn(m)
    residual = random_residual(m, n, 4)
    tensors = {
        "residual_A.weight": residual.A,
        "residual_A.weight_scale": residual.scales[:, None],
        "residual_B.weight": residual.B,
    }
    spec = GroupSpec(
        {"dense": 0, "low_rank": rank, "narrow_in": n}[structure], ("down_proj",), structure, weights="int4_g32", residual=4
    )
    if structure == "low_rank":
        spec, tensors = replace(spec, residual=0), {}
        A, B = (round_to_nearest(torch.randn(shape), "int4_g32") for shape in ((rank, n), (m, rank)))
        tensors = stored("A.", A) | stored("B.", B) | {"B.bias": b}
        expected = x @ A.dense().T @ B.dense().T + b
    else:
        W = round_to_nearest(torch.randn(m, n), "int4_g32")
        tensors |= stored("", W) if structure == "dense" else stored("B.", W) | {"B.bias": b}
        expected = x @ (W.dense() + residual.dense()).T + (0 if structure == "dense" else b)
    parts = []
    for index, part in enumerate(x.chunk(ranks, -1)):
        layer, method = rounded_layer(spec, n, m, ranks, index, monkeypatch)
        load_by_name(layer, tensors)
        method.process_weights_after_loading(layer)
        parts.append(method.apply(layer, part.contiguous()))
    torch.testing.assert_close(sum(parts), expected, atol=1e-3, rtol=1e-3)


def test_what_cannot_be_divided_or_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = GroupSpec(0, ("down_proj",), "dense", weights="int4_g128", residual=4)
    with pytest.raises(ArtifactError, match=r"down_proj: 128 inputs cannot be divided among 2 ranks in whole groups of int4_g128"):
        rounded_layer(spec, 128, 64, 2, 0, monkeypatch)
    with pytest.raises(ArtifactError, match=r"down_proj: 96 inputs cannot be divided into groups of int4_g128"):
        rounded_layer(spec, 96, 64, 1, 0, monkeypatch)
    block = GroupSpec(32, ("down_proj",), "identity_block", weights="int8")
    with pytest.raises(ArtifactError, match="an identity block in int8 cannot be divided among ranks"):
        rounded_layer(block, 128, 64, 2, 0, monkeypatch)
    with pytest.raises(EngineError, match=r"down_proj: vLLM has no kernel for int4_g128 weights of this layer on this machine \("):
        rounded_layer(spec, 128, 40, 1, 0, monkeypatch)
    layer, method = rounded_layer(spec, 128, 64, 1, 0, monkeypatch)
    with pytest.raises(ArtifactError, match=r"weight_packed is torch\.float32 in the checkpoint; .* torch\.int32"):
        load_by_name(layer, {"weight_packed": torch.zeros(64, 16)})
    with pytest.raises(ArtifactError, match=r"residual_A\.weight is \(5, 128\) in the checkpoint"):
        load_by_name(layer, {"residual_A.weight": torch.zeros(5, 128, dtype=torch.int8)})
    load_by_name(layer, {"weight_packed": torch.zeros(64, 16, dtype=torch.int32)})
    with pytest.raises(
        ArtifactError,
        match=r"missing .*: layers\.0\.down_proj\.weight_scale, .*weight_shape, .*residual_A\.weight,",
    ):
        method.process_weights_after_loading(layer)


def test_four_bits_are_loaded_as_four_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is made before or while the tensors come is larger than what is stored."""
    for structure, spec in {"dense": 0, "low_rank": 32}.items():
        group = GroupSpec(spec, ("down_proj",), structure, weights="int4_g32")  # type: ignore[arg-type]
        layer, _ = rounded_layer(group, 128, 64, 1, 0, monkeypatch)
        values = [parameter for name, parameter in layer.named_parameters() if name.endswith("weight_packed")]
        assert sum(value.nbytes for value in values) * 2 == (32 * (128 + 64) if spec else 128 * 64)
        floats = [parameter for parameter in layer.parameters() if parameter.is_floating_point()]
        assert sum(parameter.numel() for parameter in floats) < 128 * 64 // 16


def test_embeddings_and_the_output_layer_are_left_alone() -> None:
    assert config_of().get_quant_method(nn.Embedding(4, 4), "lm_head") is None


def test_untested_vllm_is_refused_when_an_artifact_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from lrserve.plugins import versions
    from lrserve.plugins.vllm.config import LrserveConfig
    from lrserve.plugins.vllm.register import register

    monkeypatch.setattr(versions, "installed_vllm", lambda: ("vllm", "0.34.0"))
    register()  # serving other models must not be disturbed
    register()
    with pytest.raises(EngineError, match=r"vllm 0\.34\.0 is installed; lrserve is tested with >=0\.32,<0\.34"):
        LrserveConfig.from_config({"quant_method": "lrserve", "format_version": 1, "groups": {}})


def mixture(*, experts: int = 3, rank: int = 32, ep: bool = False, lora: bool = False, ranks: int = 1) -> Any:
    """The method of a layer of four experts, of which a token reads two."""
    from lrserve.plugins.vllm.experts import MixtureMethod

    parallel = SimpleNamespace(tp_size=ranks, use_ep=ep)
    config = SimpleNamespace(experts_per_token=2, num_experts=4, moe_parallel_config=parallel, is_lora_enabled=lora)
    spec = GroupSpec(rank, ("experts",), "experts", experts=experts)
    return MixtureMethod("layers.0.experts", spec, SimpleNamespace(moe_config=config))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"experts": 1}, ArtifactError, "keeps 1 of 4 experts, of which a token reads 2"),
        ({"experts": 5}, ArtifactError, "keeps 5 of 4 experts"),
        ({"ep": True}, EngineError, "leave out --enable-expert-parallel"),
        ({"lora": True}, EngineError, "leave out --enable-lora"),
        ({"ranks": 3}, ArtifactError, "32 neurons cannot be divided among 3 ranks"),
    ],
)
def test_mixtures_that_vllm_cannot_serve_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"layers\.0\.experts: .*{message}"):
        mixture(**options)


def test_experts_that_do_not_fit_or_do_not_come_are_refused() -> None:
    from lrserve.plugins.vllm.experts import MixtureMethod

    loaded: list[Any] = []
    method = MixtureMethod.__new__(MixtureMethod)
    method.prefix, method.spec = "layers.0.experts", GroupSpec(8, ("experts",), "experts", experts=2)
    method._seen, method._dummy, method._load = set(), False, lambda *arguments: loaded.append(arguments)
    parameter = nn.Parameter(torch.empty(0))
    for shape, shard, expert in (((8, 4), "w1", 2), ((9, 4), "w3", 1), ((4, 9), "w2", 1)):
        with pytest.raises(ArtifactError, match=rf"of expert {expert}; config.json lists 2 experts of 8"):
            method._load_expert(parameter, torch.zeros(shape), "w", shard, expert)
    assert loaded == []
    for shape, shard, expert in (((8, 4), "w1", 0), ((4, 8), "w2", 0), ((8, 4), "w3", 0), ((8, 4), "w1", 1)):
        method._load_expert(parameter, torch.zeros(shape), "w", shard, expert)
    assert len(loaded) == 4
    with pytest.raises(ArtifactError, match=r"missing from the checkpoint: layers\.0\.experts\.1\.w2\.weight, .*\.1\.w3\.weight\."):
        method.process_weights_after_loading(SimpleNamespace())


def test_a_method_is_chosen_for_experts_only_where_experts_are_listed() -> None:
    config = config_of()
    config.groups["mlp.experts"] = GroupSpec(8, ("experts",), "experts", experts=2)
    with pytest.raises(ArtifactError, match="mlp.experts: config.json lists experts, vLLM has Embedding there"):
        config.get_quant_method(nn.Embedding(4, 4), "mlp.experts")
    with pytest.raises(ArtifactError, match="lists experts, vLLM has a linear layer there"):
        config.get_quant_method(bare("ReplicatedLinear"), "mlp.experts")
