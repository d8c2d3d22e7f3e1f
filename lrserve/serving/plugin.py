"""The entry point by which vLLM learns of lrserve (group `vllm.general_plugins`).

vLLM calls `register` in every one of its processes, sometimes more than once, and for every model that anybody serves
where lrserve is installed. So it only registers a name, and checks nothing: whether this vLLM is one that lrserve was
tested with is asked when an lrserve artifact is loaded (vllm_config.py), not when somebody serves another model. Processes
that lrserve starts say so in their environment, and there it does the same for dense models as for artifacts.
"""

from __future__ import annotations


def register() -> None:
    """Tell vLLM which class reads a `quantization_config` whose `quant_method` is `lrserve`."""
    import os

    from vllm.model_executor.layers.quantization import register_quantization_config

    from lrserve.compression.lowrank import QUANT_METHOD
    from lrserve.serving.cpu import KERNELS
    from lrserve.serving.vllm_config import LrserveConfig

    register_quantization_config(QUANT_METHOD)(LrserveConfig)
    if os.environ.get(KERNELS) == "1":
        register_kernels()


def register_kernels() -> None:
    """Let models that this process builds from now on attend by serving/attention.py and multiply by serving/linear.py, on the CPU.

    vLLM has a registry for attention. For products it has none: its layers look `dispatch_cpu_unquantized_gemm` up in its module
    when their weights are loaded, and there a function that asks lrserve first takes its place. Safe to call again.
    """
    from functools import partial

    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not current_platform.is_cpu():
        return
    from lrserve.serving.linear import dispatch

    register_backend(AttentionBackendEnum.CPU_ATTN, "lrserve.serving.attention.OneCallBackend")
    theirs = utils.dispatch_cpu_unquantized_gemm
    if getattr(theirs, "func", None) is not dispatch:
        utils.dispatch_cpu_unquantized_gemm = partial(dispatch, theirs)
