"""The entry point by which vLLM learns of lrserve (group `vllm.general_plugins`).

vLLM calls `register` in each of its processes, sometimes more than once, and for every model that is served where lrserve is
installed. So it only registers a name; in a server of lrserve's it also ties the process to its parent. Whether this vLLM is one
that lrserve was tested with is asked when an artifact is loaded (config.py), not when somebody serves another model.
"""

from __future__ import annotations

import logging
import os

from lrserve.plugins.lifetime import ENDS_WITH_PARENT, end_with_parent

_log = logging.getLogger(__name__)


def register() -> None:
    """Tell vLLM which class reads a `quantization_config` whose `quant_method` is `lrserve`.

    Safe to call again. Where this vLLM lacks what lrserve extends, it logs one line: artifacts of lrserve cannot be served there,
    and other models are served as without lrserve.
    """
    if os.environ.get(ENDS_WITH_PARENT):
        end_with_parent()
    try:
        from vllm.model_executor.layers import quantization

        from lrserve.compression.spec import QUANT_METHOD
        from lrserve.plugins.vllm.config import LrserveConfig

        if QUANT_METHOD not in quantization.QUANTIZATION_METHODS:
            quantization.register_quantization_config(QUANT_METHOD)(LrserveConfig)
    except Exception as error:  # of whatever kind a future vLLM raises: another model's server must start
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        _log.warning("lrserve cannot extend this vLLM (%s): its artifacts will not load here", reason)
