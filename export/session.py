"""Sessions of ONNX Runtime or OpenVINO on the provider that was asked for, or an error."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors  # ty: ignore[missing-module-member]  # compiled

from expertgrid.export.metadata import AS_IT_IS, Options
from expertgrid.export.openvino import OpenVinoSession, check_openvino
from expertgrid.model.system.errors import InputError, unknown

Session = onnxruntime.InferenceSession | OpenVinoSession

ORT_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    RuntimeError,
)
ORT_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
PROVIDERS = (*ORT_PROVIDERS, "openvino")
# Options with which a provider computes float32 as float32: by default convolutions on CUDA are in TF32, and their
# algorithm is the one that was fastest at the moment, which may be one of those that round more.
FULL_FP32 = {"cuda": {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}}


def check_provider(name: str) -> None:
    """Raises InputError for a provider that does not exist or is not installed."""
    if name not in PROVIDERS:
        raise unknown("provider", name, PROVIDERS)
    if name == "openvino":
        check_openvino()
    elif ORT_PROVIDERS[name] not in onnxruntime.get_available_providers():
        raise InputError(f"provider {name!r}: this ONNX Runtime ({onnxruntime.__version__}) was built without it")


def open_any(
    model: bytes,
    provider: str,
    name: str,
    precision: str = "fp32",
    full_fp32: bool = False,
    options: Options = AS_IT_IS,
) -> Session:
    """A session for an ONNX model on any of PROVIDERS, that of ONNX Runtime or of OpenVINO.

    `precision` is what the model was made for, and with `full_fp32` float32 is float32. Raises InputError as
    `open_session` and `OpenVinoSession`.
    """
    check_provider(provider)
    if provider == "openvino":
        return OpenVinoSession(model, name, precision, options)
    if precision == "bf16":
        raise InputError(
            f"{name}: computes in bfloat16, which is done with provider openvino; {provider!r} was asked for"
        )
    return open_session(model, provider, name, full_fp32, options)


def open_session(
    model: bytes,
    provider: str,
    name: str,
    full_fp32: bool = False,
    options: Options = AS_IT_IS,
) -> onnxruntime.InferenceSession:
    """A session for an ONNX model that runs on `provider` ("cpu", "cuda", "tensorrt").

    `name` is what errors call the model. Raises InputError for a model that does not load and for a provider that is
    not there or does not start: ONNX Runtime would go on with the CPU.
    """
    check_provider(provider)
    unloaded = io.StringIO()
    if provider != "cpu":
        import torch  # first: it may bring CUDA's libraries

        with contextlib.redirect_stdout(unloaded):  # where it says which of the CUDA libraries are not there
            onnxruntime.preload_dlls()
    of_session = session_options(options)
    of_session.log_severity_level = 4  # the errors below say it
    if provider != "cpu":
        of_session.add_session_config_entry("session.disable_cpu_ep_fallback", "1")  # it runs every node
    onnxruntime.set_default_logger_severity(4)
    of_provider = FULL_FP32.get(provider, {}) if full_fp32 else {}
    if provider == "cuda" and options.layout == "NHWC":
        of_provider = of_provider | {"prefer_nhwc": "1"}
    try:
        session = onnxruntime.InferenceSession(
            model,
            of_session,
            providers=[(ORT_PROVIDERS[provider], of_provider)],
            enable_fallback=0,
        )
    except (*ORT_ERRORS, UnicodeDecodeError) as error:  # of a message with a name of the file that is not UTF-8
        if provider != "cpu" and not torch.cuda.is_available():
            raise InputError(f"provider {provider!r} does not start here: there is no CUDA device") from None
        reason = str(error).splitlines()[0]
        raise InputError(f"{name}: ONNX Runtime does not load it: {reason}") from None
    if session.get_providers()[0] != ORT_PROVIDERS[provider]:
        reason = unloaded.getvalue().partition("\n")[0] or f"ONNX Runtime would use {session.get_providers()[0]}"
        reason = reason if torch.cuda.is_available() else "there is no CUDA device"
        raise InputError(f"provider {provider!r} does not start here: {reason}")
    return session


def session_options(options: Options) -> onnxruntime.SessionOptions:
    """ONNX Runtime's, with as many threads as there are where `options` does not say fewer."""
    of_session = onnxruntime.SessionOptions()
    of_session.intra_op_num_threads = options.threads_here()
    if not options.spinning:
        of_session.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if options.layout == "NCHW":  # the level below that which blocks channels
        of_session.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return of_session


def run(session: Session, outputs: Sequence[str], inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs of a network, which are all tensors. ONNX has sparse ones, lists and maps too: hence the cast."""
    return cast(list[np.ndarray], session.run(outputs, inputs))
