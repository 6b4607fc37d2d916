"""Sessions of OpenVINO, with the method of ONNX Runtime's that is used here."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from expertgrid.export.metadata import AS_IT_IS, Options
from expertgrid.model.system.errors import InputError

HINTS = {"fp32": "f32", "fp16": "f32", "int8": "f32", "bf16": "bf16"}  # what is not reduced in the file


def check_openvino() -> None:
    """Raises InputError where OpenVINO is not installed."""
    try:
        import openvino  # noqa: F401
    except ImportError:
        raise InputError("provider 'openvino': is not installed; `uv sync --extra openvino` brings it") from None


@cache
def _core() -> Any:
    """OpenVINO, once for the process and kept until it ends.

    Each of its cores gives the thread a stack for signals, and takes back the one from before when it is freed. Where
    two are freed in the order in which they were made, the thread is left with one that is gone, and the next signal
    with a handler, such as Ctrl-C, ends the process (OpenVINO 2026).
    """
    import openvino

    return openvino.Core()


class OpenVinoSession:
    """An ONNX model that OpenVINO runs on the CPU. Of the options it takes the number of threads.

    In `bf16` a model of float32 computes in bfloat16. Raises InputError for a model that does not load, and where the
    processor does not compute in bfloat16: OpenVINO would go on in float32.
    """

    def __init__(self, model: bytes, name: str, precision: str = "fp32", options: Options = AS_IT_IS):
        check_openvino()
        properties = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": HINTS[precision],
            "INFERENCE_NUM_THREADS": options.threads_here(),
        }
        core = _core()
        try:
            self.compiled = core.compile_model(core.read_model(model), "CPU", properties)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise InputError(f"{name}: OpenVINO does not load it: {reason}") from None
        if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise InputError("precision 'bf16': this processor does not compute in bfloat16")
        self.request = self.compiled.create_infer_request()

    def run(self, outputs: Sequence[str], inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs of these names, copied."""
        results = self.request.infer(dict(inputs), share_inputs=True)
        return [results[name] for name in outputs]
