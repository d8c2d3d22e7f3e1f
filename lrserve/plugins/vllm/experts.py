"""Mixtures of experts inside vLLM that have fewer experts, or narrower ones, than config.json's model. Imports vLLM.

vLLM's kernels multiply by the experts that are there. The router's layer keeps a row for every expert of the dense model: vLLM
builds it without a quantization method in some models. The experts that stay come first, and only their logits are read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from lrserve.compression.spec import GroupSpec
from lrserve.errors import ArtifactError, EngineError
from lrserve.plugins.vllm.loading import is_dummy, require_complete, share_of_neurons

_SHARDS: Final = ("w1", "w2", "w3")  # vLLM's names for gate, down and up


class MixtureMethod(UnquantizedFusedMoEMethod):
    """Holds and multiplies the experts of one decoder layer: as many, and as wide, as the artifact's config.json says."""

    def __init__(self, prefix: str, spec: GroupSpec, layer: Any) -> None:
        """Take the layer that vLLM is building.

        Raises:
            ArtifactError: the layer has fewer experts, or a token reads more of them.
            EngineError: vLLM is asked for what these layers cannot do.
        """
        config = layer.moe_config
        if not config.experts_per_token <= spec.experts <= config.num_experts:
            raise ArtifactError(
                f"{prefix}: config.json keeps {spec.experts} of {config.num_experts} experts, of which a token reads "
                f"{config.experts_per_token}. Export the artifact again"
            )
        if config.moe_parallel_config.use_ep:
            raise EngineError(
                f"{prefix}: the experts of this artifact cannot be spread over GPUs; leave out --enable-expert-parallel"
            )
        if config.is_lora_enabled:
            raise EngineError(f"{prefix}: LoRA does not work with the experts of this artifact; leave out --enable-lora")
        share_of_neurons(prefix, spec.rank, config.moe_parallel_config.tp_size)
        sizes = {"num_experts": spec.experts, "num_local_experts": spec.experts, "num_logical_experts": spec.experts}
        super().__init__(replace(config, **sizes, intermediate_size=spec.rank, intermediate_size_per_partition_unpadded=None))
        self.prefix, self.spec = prefix, spec
        self._removes: bool = spec.experts < config.num_experts
        if self._removes and self.experts_cls is not None and self.experts_cls.is_monolithic():
            raise EngineError(
                f"{prefix}: vLLM's kernel {self.experts_cls.__name__} chooses among all experts; use --moe-backend triton"
            )
        self._router = create_fused_moe_router(
            top_k=config.experts_per_token,
            global_num_experts=spec.experts,
            renormalize=layer.renormalize,
            scoring_func=layer.scoring_func,
            routed_scaling_factor=layer.routed_scaling_factor,
        )
        self._load: Any = None
        self._seen: set[tuple[int, str]] = set()
        self._dummy = False

    @property
    def supports_eplb(self) -> bool:
        """Return False: vLLM would need the experts of the dense model."""
        return False

    @property
    def is_monolithic(self) -> bool:
        """Whether vLLM hands over the router's logits, which are those of all experts, and not its choice."""
        return self._removes

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, act_dtype: torch.dtype, moe_parallel_config: Any
    ) -> tuple[int, int]:
        """Return the hidden size and the neurons of an expert on this rank, in the place of those of the dense model."""
        width = self.spec.rank // moe_parallel_config.tp_size
        sizes: tuple[int, int] = super().maybe_roundup_sizes(hidden_size, width, act_dtype, moe_parallel_config)
        return sizes

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Hang in the weights of the experts that are there."""
        self.moe.hidden_dim, self.moe.intermediate_size_per_partition = hidden_size, intermediate_size_per_partition
        self._load = extra_weight_attrs["weight_loader"]
        attributes = {**extra_weight_attrs, "weight_loader": self._load_expert}
        super().create_weights(layer, self.spec.experts, hidden_size, intermediate_size_per_partition, params_dtype, **attributes)
        self._dummy = is_dummy(get_current_vllm_config_or_none())

    def _load_expert(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        width = loaded_weight.shape[1 if shard_id == "w2" else 0]
        if expert_id >= self.spec.experts or width != self.spec.rank:
            raise ArtifactError(
                f"{self.prefix}: the checkpoint has {width} neurons of expert {expert_id}; config.json lists {self.spec.experts} "
                f"experts of {self.spec.rank}. Copy or export the artifact again"
            )
        self._seen.add((expert_id, shard_id))
        loaded: bool | None = self._load(param, loaded_weight, weight_name, shard_id, expert_id, return_success)
        return loaded

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that every expert has come, and let vLLM bring the weights into the kernel's layout.

        Raises:
            ArtifactError: a tensor is missing from the checkpoint.
        """
        wanted = {(expert, shard) for expert in range(self.spec.experts) for shard in _SHARDS}
        missing = [f"{self.prefix}.{expert}.{shard}.weight" for expert, shard in sorted(wanted - self._seen)]
        require_complete(self.prefix, missing, dummy=self._dummy)
        super().process_weights_after_loading(layer)

    def apply_monolithic(
        self, layer: Any, x: torch.Tensor, router_logits: torch.Tensor, input_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Choose among the experts that are there, and multiply x (t, n) -> (t, n). `router_logits` (t, E) are of all experts."""
        assert self.moe_kernel is not None
        weights, experts = self._router.select_experts(
            hidden_states=x,
            router_logits=router_logits[:, : self.spec.experts].contiguous(),
            topk_indices_dtype=self.topk_indices_dtype,
            input_ids=input_ids,
        )
        y: Any = self.moe_kernel.apply(
            hidden_states=x,
            w1=layer.w13_weight,
            w2=layer.w2_weight,
            topk_weights=weights,
            topk_ids=experts,
            activation=layer.activation,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
            global_num_experts=self.spec.experts,
            expert_map=None,
            shared_experts=None,
            shared_experts_input=None,
        )
        return y  # type: ignore[no-any-return]
