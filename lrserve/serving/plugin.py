"""The entry point by which vLLM learns of lrserve (group `vllm.general_plugins`).

vLLM calls `register` in every one of its processes, sometimes more than once, and for every model that anybody serves
where lrserve is installed. So it only registers a name, and checks nothing: whether this vLLM is one that lrserve was
tested with is asked when an lrserve artifact is loaded (vllm_config.py), not when somebody serves another model.
"""

from __future__ import annotations


def register() -> None:
    """Tell vLLM which class reads a `quantization_config` whose `quant_method` is `lrserve`."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from lrserve.compression.lowrank import QUANT_METHOD
    from lrserve.serving.vllm_config import LrserveConfig

    register_quantization_config(QUANT_METHOD)(LrserveConfig)
