"""The execution provider of ONNX Runtime, CPU or CUDA, and the number format that graphs have for it.

On CUDA, GroupQueryAttention computes in float16 and bfloat16 only, and with no bias, which the profile `portable` needs. On the
CPU there is no product in bfloat16. What is installed says little: a session that cannot load CUDA goes on without it, and its
list of providers says so.
"""

from __future__ import annotations

import contextlib
import functools
import io
from typing import Any, Final, Literal

from lrserve.errors import EngineError, InputError
from lrserve.recipe import EngineSettings

Provider = Literal["cpu", "cuda"]
"""Also ONNX Runtime's name of the device."""

_CUDA: Final = "CUDAExecutionProvider"
_CPU: Final = "CPUExecutionProvider"
_INSTALL: Final = "pip install 'lrserve[onnx-gpu]'"
_OPTIONS: Final = {"device_id": "0", "arena_extend_strategy": "kSameAsRequested"}
"""Of CUDA: the first device that CUDA_VISIBLE_DEVICES leaves, and no memory ahead of need, since two engines share it."""


def settled(settings: EngineSettings) -> EngineSettings:
    """Return settings whose provider and number format of graphs are chosen.

    Raises:
        EngineError: CUDA is asked for, and not there.
        InputError: graphs that the provider does not run.
    """
    dtype, profile = settings.onnx_dtype or settings.dtype, settings.onnx_profile
    fits = dtype != "float32" and profile == "genai"
    if settings.onnx_provider == "cuda":
        if not fits:
            found = "float32 graphs" if dtype == "float32" else f"graphs of the profile {profile}"
            raise InputError(
                f"engine.onnx_provider cuda: CUDA's attention does not run {found}; set engine.onnx_dtype to bfloat16 or float16, "
                "with engine.onnx_profile genai"
            )
        if reason := why_no_cuda():
            raise no_cuda(reason)
    if settings.onnx_provider == "cuda" or (settings.onnx_provider == "auto" and fits and why_no_cuda() is None):
        return settings.model_copy(update={"onnx_provider": "cuda", "onnx_dtype": dtype})
    if settings.onnx_dtype == "bfloat16":
        raise InputError(
            "engine.onnx_dtype bfloat16: ONNX Runtime multiplies in it on CUDA only, and here it would have to prove the graph on "
            "the CPU; set float16, or export on a machine with lrserve[onnx-gpu]"
        )
    return settings.model_copy(update={"onnx_provider": "cpu", "onnx_dtype": settings.onnx_dtype or "float32"})


@functools.cache
def why_no_cuda() -> str | None:
    """Say why no session here computes on CUDA, and the next step; None where one does, which a tiny one shows."""
    try:
        import onnxruntime
        from onnx import TensorProto, helper
    except ImportError as error:
        return f"{error.name} is not installed. Run: {_INSTALL}"
    if _CUDA not in onnxruntime.get_available_providers():
        return f"the installed onnxruntime is a build without it. Run: pip uninstall onnxruntime onnxruntime-genai; {_INSTALL}"
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "probe", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnxruntime.set_default_logger_severity(4)  # the answer says it
    try:
        return missing_cuda(session_on(model.SerializeToString(), quiet_options(), "cuda"))
    finally:
        onnxruntime.set_default_logger_severity(2)  # as it begins


def session_on(graph: str | bytes, options: Any, provider: Provider) -> Any:
    """Open an `onnxruntime.InferenceSession` that asks for a provider, and for the CPU for what has no kernel there."""
    import onnxruntime

    if provider == "cpu":
        return onnxruntime.InferenceSession(graph, options, providers=[_CPU])
    with contextlib.redirect_stdout(io.StringIO()):  # what is missing it prints; the session's providers say whether that matters
        onnxruntime.preload_dlls()
        return onnxruntime.InferenceSession(graph, options, providers=[(_CUDA, _OPTIONS), _CPU])


def missing_cuda(session: Any) -> str | None:
    """Say why a session that asked for CUDA does without it, and the next step; None if it has it."""
    if _CUDA in session.get_providers():
        return None
    import onnxruntime

    return (
        f"a session finds no GPU, or no CUDA {getattr(onnxruntime, 'cuda_version', '')} and cuDNN 9 that it can load. See what "
        "nvidia-smi says, and run: pip install 'onnxruntime-gpu[cuda,cudnn]'"
    )


def no_cuda(reason: str) -> EngineError:
    """Return the error that says why, and how to go on without."""
    return EngineError(
        f"engine.onnx_provider cuda: ONNX Runtime does not compute on CUDA here: {reason}. Or set engine.onnx_provider: cpu"
    )


def quiet_options() -> Any:
    """Return session options with which failures arrive as exceptions only."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return options
