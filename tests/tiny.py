"""Tiny random models of every supported family, with some groups factorized by random factors."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from exporters.onnx_families import FAMILIES as ONNX_FAMILIES
from exporters.vllm import low_rank_groups
from lrserve.compression.experts import resize_experts
from lrserve.compression.groups import (
    FAMILIES,
    KINDS,
    STRUCTURES,
    Group,
    GroupNames,
    Mixture,
    Stored,
    Structure,
    allocated,
    find_groups,
    find_mixtures,
)
from lrserve.compression.layers import IdentityBlock
from lrserve.compression.level import SCHEMES, Level, Precision
from lrserve.compression.lowrank import install_low_rank, keep_outputs, load_residual, load_rounded
from lrserve.compression.quantize import Residual, round_to_nearest
from lrserve.compression.spec import REPAIRED, GroupSpec, leaves, matrices, quantization_config, specs_of
from lrserve.inputs.checkpoint import as_stored
from lrserve.inputs.config_file import model_class

FACTORED: Final = ("identity_block", "low_rank")
"""What a group is stored as that has factors of its own; the structures in which every group has them."""
APART: Final[dict[str, tuple[int, Stored]]] = {
    "self_attn.q_proj": (24, "low_rank"),
    "self_attn.v_proj": (16, "identity_block"),
    "mlp.gate_proj": (20, "low_rank"),
}
"""Linears with factors of their own beside dense ones that the engine multiplies together with them."""
FAMILIES_TESTED = sorted(FAMILIES)
MULTIMODAL = [name for name in FAMILIES_TESTED if FAMILIES[name].multimodal]
"""The LLM is inside; what reads images is tiny too."""
WITH_MLPS = [name for name in FAMILIES_TESTED if FAMILIES[name].experts is None]
"""The others have mixtures of experts in the place of their MLPs."""
WITH_EXPERTS = [name for name in FAMILIES_TESTED if name not in WITH_MLPS]
EXPERTS_KEPT: Final = ((3, 1.0), None, (4, 0.5), (2, 0.5), None)
"""By layer, in turns: the number of experts of four that stay, and the part of their neurons; None is dense."""
RENDERED = sorted(ONNX_FAMILIES)
"""Families that the ONNX graph knows."""
SERVED_IN_TESTS: Final = (
    "Gemma3ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
"""Families on real vLLM engines in `make test`. The others are in `make soak`."""
VOCABULARY = 256
_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3_text",
    "SmolLM3ForCausalLM": "smollm3",
    "GraniteForCausalLM": "granite",
    "Olmo2ForCausalLM": "olmo2",
    "Phi3ForCausalLM": "phi3",
    "Starcoder2ForCausalLM": "starcoder2",
    "MixtralForCausalLM": "mixtral",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Gemma3ForConditionalGeneration": "gemma3",
    "Mistral3ForConditionalGeneration": "mistral3",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
}
_TEXT_TYPES = {
    "Gemma3ForConditionalGeneration": "gemma3_text",
    "Mistral3ForConditionalGeneration": "mistral",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl_text",
}
"""Of the LLM inside multimodal models."""
IMAGE_TOKEN = VOCABULARY - 1
_WIDE = (
    "Qwen2ForCausalLM",
    "SmolLM3ForCausalLM",
    "GraniteForCausalLM",
    "Olmo2ForCausalLM",
    "Phi3ForCausalLM",
    "Starcoder2ForCausalLM",
    "Qwen2_5_VLForConditionalGeneration",
)
"""Whose heads are as wide as hidden_size / heads."""
_TIED = (
    "Qwen2ForCausalLM",
    "Gemma3ForCausalLM",
    "SmolLM3ForCausalLM",
    "Starcoder2ForCausalLM",
    "Gemma3ForConditionalGeneration",
)


def _windows(layers: int) -> dict[str, Any]:
    """Attention over the last 24 tokens from the fourth layer on."""
    return {"sliding_window": 24, "layer_types": [*["full_attention"] * 3, *["sliding_attention"] * (layers - 3)][:layers]}


def _special(architecture: str, layers: int) -> dict[str, Any]:
    """What only this family has, with values that matter."""
    return {
        "Gemma3ForCausalLM": _windows(layers),
        "Gemma3ForConditionalGeneration": _windows(layers),
        "Qwen2_5_VLForConditionalGeneration": {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]}},
        "SmolLM3ForCausalLM": {"no_rope_layer_interval": 2},
        "GraniteForCausalLM": {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.1,
            "logits_scaling": 2.0,
        },
        "Phi3ForCausalLM": {"sliding_window": 24, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "Starcoder2ForCausalLM": {"sliding_window": 24},
        "MixtralForCausalLM": {"num_local_experts": 4},
        "Qwen3MoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    }.get(architecture, {})


def _vision(architecture: str, width: int) -> dict[str, Any]:
    """What a multimodal model has besides its LLM, of this hidden width: images of 28 x 28 pixels become 4 tokens."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}
    return {
        "Gemma3ForConditionalGeneration": {
            "vision_config": {**sizes, "patch_size": 7, "vision_use_head": False},
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE_TOKEN,
        },
        "Mistral3ForConditionalGeneration": {
            "vision_config": {**sizes, "model_type": "pixtral", "head_dim": 32, "patch_size": 7},
            "spatial_merge_size": 2,
            "image_token_index": IMAGE_TOKEN,
        },
        "Qwen2_5_VLForConditionalGeneration": {
            "vision_config": {
                "hidden_size": 64,
                "intermediate_size": 96,
                "depth": 2,
                "num_heads": 2,
                "patch_size": 7,
                "window_size": 28,
                "fullatt_block_indexes": [1],
                "out_hidden_size": width,
            },
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": IMAGE_TOKEN - 1,
            "vision_start_token_id": IMAGE_TOKEN - 2,
            "vision_end_token_id": IMAGE_TOKEN - 3,
        },
    }[architecture]


def dense_model(architecture: str, *, layers: int = 2) -> Any:
    """A random model whose outputs depend visibly on every weight and bias."""
    # vLLM's CPU attention wants a head_dim of at least 32.
    sizes = {"hidden_size": 128} if architecture in _WIDE else {"hidden_size": 64, "head_dim": 32}
    special_tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    of_text = {
        **sizes,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        **special_tokens,
        **_special(architecture, layers),
    }
    if text_type := _TEXT_TYPES.get(architecture):
        inside = {"text_config": {**of_text, "model_type": text_type}, **special_tokens}
        of_text = {**inside, **_vision(architecture, sizes["hidden_size"])}
    config = AutoConfig.for_model(
        _MODEL_TYPES[architecture], **of_text, tie_word_embeddings=architecture in _TIED, architectures=[architecture]
    )
    config.dtype = "float32"
    torch.manual_seed(0)
    model = model_class(config).from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            std = 0.2 if "embed" in name else parameter.shape[-1] ** -0.5
        else:
            std = 0.3
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=std)
    return model


def with_image(architecture: str, seed: int) -> dict[str, torch.Tensor]:
    """A prompt around an image of 28 x 28 pixels, 4 tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([[1, 7, 8, *[IMAGE_TOKEN] * 4, 9, 10, 11]])
    pixels = torch.randn(1, 3, 28, 28, generator=generator)
    kinds = (ids == IMAGE_TOKEN).int()
    return {
        "Gemma3ForConditionalGeneration": {"pixel_values": pixels, "token_type_ids": kinds},
        "Mistral3ForConditionalGeneration": {"pixel_values": pixels, "image_sizes": torch.tensor([[28, 28]])},
        "Qwen2_5_VLForConditionalGeneration": {
            "pixel_values": torch.randn(16, 3 * 2 * 7 * 7, generator=generator),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": kinds,
        },
    }[architecture] | {"input_ids": ids}


def levels_of(ranks: Iterable[tuple[Group, int]]) -> list[tuple[Group, Level]]:
    """Return the levels of units that are not rounded."""
    return [(unit, Level(rank)) for unit, rank in ranks]


def factorized_model(architecture: str, *, layers: int = 2, structure: Structure | None = None, apart: bool = False) -> Any:
    """In all layers but the second every group compressed (each to its own rank), in the second only some.

    In one structure, or by turns: identity blocks in the first layer, two factors in the second, fewer neurons in the third.
    With `apart` the second layer's linears q, v and gate have factors of their own, and k and up are dense; where each of them is a
    part of one tensor there is nothing to take apart.
    """
    model = dense_model(architecture, layers=layers)
    groups = find_groups(model)
    units = {own: {unit.name: unit for unit in allocated(groups, own)} for own in STRUCTURES}
    specs = {}
    for index, group in enumerate(groups):
        own = structure or STRUCTURES[group.layer % len(STRUCTURES)]
        unit = units[own].get(group.name)
        if unit is not None and (group.layer != 1 or group.kind in ("qkv", "down")):
            specs |= specs_of([(unit, Level(16 + 8 * (index % 4) + 4 * group.layer))], own)
    for mixture in find_mixtures(model):
        if kept := EXPERTS_KEPT[mixture.layer % len(EXPERTS_KEPT)]:
            width = round(kept[1] * mixture.n)
            specs[mixture.name] = GroupSpec(width, leaves(mixture.members), "experts", experts=kept[0])
    if apart and (alone := apart_specs(1, architecture)):
        del specs[f"{FAMILIES[architecture].layers}.1.self_attn.qkv_proj"]
        specs |= alone
    install(model, specs)
    randomise_factors(model)
    model.config.quantization_config = quantization_config(specs)
    return model


def randomise_factors(model: Any) -> None:
    """Give factors, their biases and orders the values that belong to this seed."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, IdentityBlock) and module.order is not None:
            module.order.copy_(torch.randperm(len(module.order)))
    for name, parameter in model.named_parameters():
        if name.endswith((".A.weight", ".B.weight")):
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif name.endswith(".B.bias"):
            torch.nn.init.normal_(parameter, std=0.3)


@dataclass(frozen=True)
class Rounding:
    """What a rounded tiny model is: the plan's structure (None: dense) and rank, the precision, and the residual's rank."""

    weights: Precision
    structure: Structure | None = None
    residual: int = 0
    rank: int = 32
    kinds: tuple[str, ...] = KINDS

    def __str__(self) -> str:
        return f"{self.weights}-{self.structure or 'dense'}{f'-residual{self.residual}' if self.residual else ''}"


def rounded_model(architecture: str, *roundings: Rounding, layers: int = 2, dtype: torch.dtype = torch.float32) -> Any:
    """A model that is rounded in one way, or layer by layer in several by turns. What does not divide into groups stays float."""
    model = dense_model(architecture, layers=layers)
    groups = find_groups(model)
    kept, chosen = dict[str, Rounding](), [roundings[layer % len(roundings)] for layer in range(layers)]
    specs: dict[str, GroupSpec] = {}
    for own in STRUCTURES:
        units = [unit for unit in allocated(groups, own) if chosen[unit.layer].structure == own]
        specs |= specs_of([(unit, Level(chosen[unit.layer].rank)) for unit in units], own)
    install(model, specs)
    randomise_factors(model)
    for group in groups:
        rounding, spec = chosen[group.layer], specs.get(group.name, GroupSpec(0, leaves(group.members), "dense"))
        spec = replace(spec, weights=rounding.weights)
        if group.kind not in rounding.kinds or not all(
            SCHEMES[rounding.weights].fits(n) for _, n in matrices(group, spec).values()
        ):
            continue
        kept[group.name] = rounding
        layer = [model.get_submodule(member) for member in group.members]
        stacked: dict[Literal["weight", "A", "B"], torch.Tensor] = {}
        if spec.structure in ("dense", "narrow_out"):
            stacked["weight"] = torch.cat([linear.weight for linear in layer])
        else:
            stacked["B"] = torch.cat([linear.B.weight for linear in layer])
        if spec.structure in FACTORED:
            stacked["A"] = layer[0].first.weight
        for matrix, W in stacked.items():
            load_rounded(model, group, matrix, round_to_nearest(W.detach(), rounding.weights, dtype))
        if rounding.residual and spec.structure in REPAIRED:
            m, n = stacked["B" if spec.structure == "narrow_in" else "weight"].shape
            load_residual(model, group, random_residual(m, n, rounding.residual))
    assert kept
    model.config.quantization_config = quantization_config(low_rank_groups(model))
    return model


def random_residual(m: int, n: int, rank: int) -> Residual:
    """A residual a few times as large as what rounding to 4 bits leaves, so that it cannot be missed."""
    A, B = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((rank, n), (m, rank)))
    return Residual(A, B, torch.rand(rank) * 0.3 / (127**2 * n**0.5))


def groups_in(architecture: str) -> dict[str, GroupNames]:
    """The groups of each layer of a tiny model, by kind."""
    return {
        kind: names for kind, names in FAMILIES[architecture].groups.items() if architecture in WITH_MLPS or kind in ("qkv", "o")
    }


def apart_specs(layer: int, architecture: str = "LlamaForCausalLM") -> dict[str, GroupSpec]:
    """`APART` in one layer, of the linears that the architecture has."""
    fused = {member for names in groups_in(architecture).values() if len(names.members) > 1 for member in names.members}
    return {
        f"{FAMILIES[architecture].layers}.{layer}.{name}": GroupSpec(rank, leaves([name]), stored)
        for name, (rank, stored) in APART.items()
        if name in fused
    }


def install(model: Any, specs: dict[str, GroupSpec]) -> None:
    """`install_low_rank`, where MLPs and experts with fewer neurons keep their first ones, and mixtures their last experts."""
    groups = {group.name: group for group in find_groups(model)}
    mixtures = {mixture.name: mixture for mixture in find_mixtures(model)}
    for name, mixture in mixtures.items():
        if name in specs:
            keep_first_neurons(model, mixture, specs[name])
    install_low_rank(model, {name: spec for name, spec in specs.items() if name not in mixtures})
    for name, spec in specs.items():
        if spec.structure == "narrow_out":
            keep_outputs(model, groups[name], torch.arange(spec.rank))


def keep_first_neurons(model: Any, mixture: Mixture, spec: GroupSpec) -> None:
    """Leave a mixture its last experts, and each of them its first neurons."""
    experts, router = model.get_submodule(mixture.members[0]), model.get_submodule(mixture.router)
    family = FAMILIES[model.config.architectures[0]]
    assert family.experts is not None
    layer = model.get_submodule(f"{family.layers}.{mixture.layer}")
    resize_experts(layer, family.experts, model.config, spec.experts, spec.rank)
    smaller, kept = model.get_submodule(mixture.members[0]), slice(mixture.experts - spec.experts, None)
    with torch.no_grad():
        gate, up = experts.gate_up_proj[kept].chunk(2, dim=1)
        smaller.gate_up_proj.copy_(torch.cat([gate[:, : spec.rank], up[:, : spec.rank]], dim=1))
        smaller.down_proj.copy_(experts.down_proj[kept, :, : spec.rank])
        rows = router.weight[kept].clone()
        model.get_submodule(mixture.router).weight.zero_()[: spec.experts] = rows


def write_artifact(model: Any, folder: Path) -> Path:
    """Write the model as the vLLM exporter does; there is no tokenizer to copy."""
    from exporters.vllm import VllmExporter

    folder.mkdir(parents=True)
    VllmExporter().export(model, folder.parent / "no-source", folder, torch.float32)
    return folder


def tiny_tokenizer(*, bos: bool = False) -> Any:
    """A tokenizer whose ids are bytes (modulo the vocabulary), with or without a BOS token before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<bos>", "<eos>"]
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet[: VOCABULARY - len(special)]])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def write_dense(model: Any, folder: Path) -> Path:
    """Write a dense model with a tokenizer, in Hugging Face layout, with the tensors under the names that they have on the Hub."""
    model.save_pretrained(folder)
    if model.config.get_text_config() is not model.config:
        tied = model.all_tied_weights_keys
        state = as_stored(model, {name: tensor for name, tensor in model.state_dict().items() if name not in tied})
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_text(path: Path, documents: int, *, repetitions: int = 3) -> Path:
    """Write `documents` different texts as JSON lines; one is 45 bytes for each of the `repetitions`, and about 20 more."""
    texts = (
        f"Document {i}: " + "some words that repeat and some that do not, " * repetitions + str(i * 7919) for i in range(documents)
    )
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path
