"""The low-rank layer's slicing and checks, one rank at a time and without an engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lrserve.compression.lowrank import GroupSpec
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


def qkv_layer(tp_size: int, tp_rank: int) -> tuple[Any, Any]:
    from lrserve.serving.vllm_layer import LowRankLinearMethod

    replicas = max(1, tp_size // KV_HEADS)
    layer = bare("QKVParallelLinear", tp_size=tp_size, tp_rank=tp_rank, num_kv_head_replicas=replicas)
    method = LowRankLinearMethod("layers.0.qkv_proj", QKV)
    sizes = [HEADS // tp_size * HEAD, *([max(1, KV_HEADS // tp_size) * HEAD] * 2)]
    method.create_weights(layer, N, sizes, N, sum(sizes) * tp_size, torch.float32)
    return layer, method


def load_qkv(layer: Any, a: torch.Tensor, b: list[torch.Tensor], bias: list[torch.Tensor]) -> None:
    layer.A.weight.weight_loader(layer.A.weight, a, None)
    for shard, rows, offsets in zip("qkv", b, bias, strict=True):
        layer.B.weight.weight_loader(layer.B.weight, rows, shard)
        layer.B.bias.weight_loader(layer.B.bias, offsets, shard)


@pytest.fixture
def factors() -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    torch.manual_seed(0)
    sizes = [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD]
    return torch.randn(RANK, N), [torch.randn(m, RANK) for m in sizes], [torch.randn(m) for m in sizes]


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_column_parallel_ranks_hold_their_heads(tp_size: int, factors: Any) -> None:
    a, b, bias = factors
    x = torch.randn(5, N)
    whole = [x @ a.T @ rows.T + offsets for rows, offsets in zip(b, bias, strict=True)]
    for rank in range(tp_size):
        layer, method = qkv_layer(tp_size, rank)
        load_qkv(layer, a, b, bias)
        method.process_weights_after_loading(layer)
        q_heads = HEADS // tp_size
        kv_heads = max(1, KV_HEADS // tp_size)
        kv_rank = rank // max(1, tp_size // KV_HEADS)
        expected = [
            whole[0][:, rank * q_heads * HEAD :][:, : q_heads * HEAD],
            *(part[:, kv_rank * kv_heads * HEAD :][:, : kv_heads * HEAD] for part in whole[1:]),
        ]
        assert torch.allclose(method.apply(layer, x), torch.cat(expected, dim=1), atol=1e-4)


@pytest.mark.parametrize("reduce_results", [True, False])
def test_row_parallel_parts_sum_to_the_whole(reduce_results: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import lrserve.serving.vllm_layer as module

    torch.manual_seed(0)
    a, b, bias, x = torch.randn(RANK, N), torch.randn(24, RANK), torch.randn(24), torch.randn(5, N)
    whole = x @ a.T @ b.T + bias
    total_z = x @ a.T
    monkeypatch.setattr(module, "tensor_model_parallel_all_reduce", lambda z: total_z)
    outputs = []
    for rank in range(2):
        layer = bare("RowParallelLinear", tp_size=2, tp_rank=rank, reduce_results=reduce_results)
        method = module.LowRankLinearMethod("layers.0.down_proj", DOWN)
        method.create_weights(layer, N // 2, [24], N, 24, torch.float32)
        layer.A.weight.weight_loader(layer.A.weight, a)
        layer.B.weight.weight_loader(layer.B.weight, b)
        layer.B.bias.weight_loader(layer.B.bias, bias)
        method.process_weights_after_loading(layer)
        assert not layer.reduce_results  # either summed between the factors, or by whoever asked for partial sums
        outputs.append(method.apply(layer, x[:, rank * 16 : (rank + 1) * 16].contiguous()))
    for result in outputs if reduce_results else [sum(outputs)]:
        assert torch.allclose(result, whole, atol=1e-4)


def test_the_dense_bias_is_neither_read_nor_added(factors: Any) -> None:
    a, b, bias = factors
    layer, method = qkv_layer(1, 0)
    load_qkv(layer, a, b, bias)
    layer.bias = nn.Parameter(torch.full((sum(len(x) for x in bias),), float("nan")), requires_grad=False)
    method.process_weights_after_loading(layer)
    x = torch.randn(3, N)
    expected = x @ a.T @ torch.cat(b).T + torch.cat(bias)
    assert torch.allclose(method.apply(layer, x, layer.bias), expected, atol=1e-4)
    assert not layer.bias.any()  # where skip_bias_add hands it out


def test_missing_factors_are_named(factors: Any) -> None:
    a, b, bias = factors
    layer, method = qkv_layer(1, 0)
    layer.A.weight.weight_loader(layer.A.weight, a, None)
    layer.B.weight.weight_loader(layer.B.weight, b[0], "q")
    layer.B.bias.weight_loader(layer.B.bias, bias[0], "q")
    with pytest.raises(ArtifactError, match=r"layers\.0\.k_proj\.B\.weight, layers\.0\.k_proj\.B\.bias, layers\.0\.v_pr"):
        method.process_weights_after_loading(layer)


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
def test_tensors_that_do_not_fit_are_refused(load: Callable[[Any], None], message: str) -> None:
    layer, _ = qkv_layer(1, 0)
    with pytest.raises(ArtifactError, match=message):
        load(layer)


def config_of(**groups: tuple[str, ...]) -> Any:
    from lrserve.serving.vllm_config import LrserveConfig

    config = LrserveConfig({f"model.layers.0.{name}": GroupSpec(8, members) for name, members in groups.items()})
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return config


def test_groups_are_found_by_the_layers_name() -> None:
    config = config_of(qkv_proj=("q_proj", "k_proj", "v_proj"), o_proj=("o_proj",))
    assert config.group_of("model.layers.0.qkv_proj").rank == 8
    assert config.group_of("draft_model.model.layers.0.o_proj").rank == 8
    assert config.group_of("model.layers.1.qkv_proj") is None


@pytest.mark.parametrize(
    "groups",
    [
        {"qkv_proj": ("q_proj", "k_proj")},
        {"qkv_proj": ("k_proj", "q_proj", "v_proj")},
        {"qkv_proj": ("qkv_proj",)},
        {"q_proj": ("q_proj",)},
    ],
)
def test_other_groupings_than_vllms_are_refused(groups: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(ArtifactError, match="vLLM multiplies q_proj, k_proj, v_proj as one"):
        config_of(**groups).group_of("model.layers.0.qkv_proj")


def test_embeddings_and_the_output_layer_are_left_alone() -> None:
    assert config_of().get_quant_method(nn.Embedding(4, 4), "lm_head") is None


def test_untested_vllm_is_refused_when_an_artifact_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from lrserve.serving import plugin, versions
    from lrserve.serving.vllm_config import LrserveConfig

    monkeypatch.setattr(versions, "installed_vllm", lambda: ("vllm", "0.34.0"))
    plugin.register()  # serving other models must not be disturbed
    plugin.register()
    with pytest.raises(EngineError, match=r"vllm 0\.34\.0 is installed; lrserve is tested with >=0\.32,<0\.34"):
        LrserveConfig.from_config({"quant_method": "lrserve", "format_version": 1, "groups": {}})
