"""What config.json may say in format version 2, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from lrserve.compression.groups import Group
from lrserve.compression.level import PRECISIONS, SCHEMES
from lrserve.compression.spec import GroupSpec, parse_groups, quantization_config, tensors_of
from lrserve.errors import ArtifactError

QKV = ("q_proj", "k_proj", "v_proj")
ROUNDED = {
    "h.0.qkv_proj": GroupSpec(0, QKV, "dense", weights="int8", residual=8),
    "h.0.o_proj": GroupSpec(64, ("o_proj",), "low_rank", weights="int4_g32"),
    "h.0.mlp.gate_up_proj": GroupSpec(96, ("gate_proj", "up_proj"), "narrow_out", weights="fp8", residual=16),
    "h.0.mlp.down_proj": GroupSpec(96, ("down_proj",), "narrow_in"),
    "h.1.mlp.gate_up_proj": GroupSpec(96, ("gate_up_proj",), "narrow_out", stacked=2),
    "h.1.mlp.down_proj": GroupSpec(96, ("down_proj",), "narrow_in"),
    "h.2.mlp.c_fc": GroupSpec(96, ("c_fc",), "narrow_out"),
    "h.2.mlp.c_proj": GroupSpec(96, ("c_proj",), "narrow_in"),
    "h.3.mlp.experts": GroupSpec(96, ("experts",), "experts", experts=6),
}


def parse(version: int = 2, **entry: Any) -> GroupSpec:
    groups = {"h.0.o_proj": {"structure": "dense", "members": ["o_proj"], **entry}}
    return parse_groups({"format_version": version, "groups": groups})["h.0.o_proj"]


def test_what_is_written_is_read() -> None:
    config = quantization_config(ROUNDED)
    assert config["format_version"] == 2
    assert config["groups"]["h.0.qkv_proj"] == {"structure": "dense", "members": list(QKV), "weights": "int8", "residual": 8}
    assert config["groups"]["h.0.mlp.down_proj"] == {"structure": "narrow_in", "rank": 96, "members": ["down_proj"]}
    assert config["groups"]["h.1.mlp.gate_up_proj"] == {
        "structure": "narrow_out",
        "rank": 96,
        "members": ["gate_up_proj"],
        "stacked": 2,
    }
    assert config["groups"]["h.3.mlp.experts"] == {"structure": "experts", "rank": 96, "members": ["experts"], "experts": 6}
    assert parse_groups(config) == ROUNDED
    plain = {"h.0.o_proj": GroupSpec(64, ("o_proj",))}
    assert quantization_config(plain)["format_version"] == 1
    for version in (1, 2):
        assert parse_groups({**quantization_config(plain), "format_version": version}) == plain


@pytest.mark.parametrize("weights", PRECISIONS)
def test_every_precision_is_read(weights: str) -> None:
    assert parse(weights=weights).weights == weights


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"weights": "int3"}, "unknown weights 'int3' in config.json; this lrserve reads int8, int4_g32"),
        ({"weights": ["int8"]}, r"unknown weights \['int8'\]"),
        ({}, "a dense group in config.json has weights and no rank"),
        ({"weights": "int8", "rank": 8}, "a dense group in config.json has weights and no rank"),
        ({"weights": "int8", "residual": 0}, "residual 0 in config.json is not a positive integer"),
        ({"weights": "int8", "residual": True}, "residual True in config.json"),
        ({"weights": "int8", "residual": "8"}, "residual '8' in config.json"),
        ({"structure": "narrow_in", "rank": 8, "residual": 8}, "a residual in config.json needs weights"),
        (
            {"structure": "low_rank", "rank": 8, "weights": "int8", "residual": 8},
            "structures dense, narrow_out, narrow_in",
        ),
        ({"structure": "low_rank", "weights": "int8"}, "rank None in config.json is not a positive integer"),
        ({"weights": "int8", "ordered": True}, "ordered True in config.json does not fit the structure dense"),
        ({"weights": "int8", "stacked": 2}, "stacked 2 in config.json does not fit the structure dense"),
        ({"structure": "narrow_out", "rank": 8, "stacked": 0}, "stacked 0 in config.json"),
        ({"structure": "narrow_out", "rank": 8}, "removes neurons from a part of an MLP only"),
        ({"structure": "experts", "rank": 8}, "experts 0 in config.json does not fit the structure experts"),
        ({"structure": "experts", "rank": 8, "experts": True}, "experts True in config.json"),
        ({"structure": "experts", "experts": 2}, "rank None in config.json is not a positive integer"),
        ({"structure": "experts", "rank": 8, "experts": 2, "weights": "int8"}, "experts in config.json cannot have weights"),
        ({"structure": "low_rank", "rank": 8, "experts": 2}, "experts 2 in config.json does not fit the structure low_rank"),
        ({"weights": "int8", "version": 1}, "rounded weights need format_version 2, config.json says 1"),
        ({"weights": "int8", "version": 3}, "format_version is 3; this lrserve reads 1 and 2"),
    ],
)
def test_what_is_malformed_is_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        parse(**entry)


@pytest.mark.parametrize("weights", PRECISIONS)
def test_a_weight_takes_the_bytes_that_its_scheme_counts(weights: Any) -> None:
    group = Group("o", "o", 0, ("o",), (48,), 256)
    found = tensors_of(group, GroupSpec(0, ("o",), "dense", weights=weights))
    size = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) * (dtype.itemsize if dtype else 2) for shape, dtype in found.values())
    assert size - (16 if "o.weight_shape" in found else 0) == SCHEMES[weights].stored_bytes(48, 256)


@pytest.mark.parametrize(("name", "stacked"), [("gate_up_proj", 1), ("gate_up_proj", 3), ("gate_proj", 1), ("c_fc", 2)])
def test_only_all_linears_that_give_the_neurons_lose_some(name: str, stacked: int) -> None:
    entry = {"structure": "narrow_out", "rank": 8, "members": [name], **({"stacked": stacked} if stacked > 1 else {})}
    with pytest.raises(ArtifactError, match="removes neurons from a part of an MLP only"):
        parse_groups({"format_version": 1, "groups": {f"h.0.mlp.{name}": entry}})
