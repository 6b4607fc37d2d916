"""Float16 and int8 versions of an ONNX model, and the nodes that have to stay in float32 for them to be right.

Both reductions are ONNX Runtime's own: `onnxruntime.transformers.float16` and `onnxruntime.quantization`. A model is
the content of one file with the input and output that `export.to_onnx` gives it; shapes, the open batch and the
metadata are kept.
"""

import copy
import platform
import tempfile
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType, create_calibrator
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from expertgrid.export.compare import onnx_logits
from expertgrid.export.session import open_session
from expertgrid.export.to_onnx import INPUT, checked

Reduced = Literal["fp16", "int8"]

HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum")  # each starts a group of nodes that are reduced together
QUANTIZED = ("Conv", "Gemm", "MatMul", "Add", "Mul", "Relu", "MaxPool")
FLOAT_OUTPUT = ("Gemm",)  # gates and logits: 8 bits in the range that calibration saw would clip them
LARGEST = np.finfo(np.float16).max / 2  # what is larger on some images may be too large on others
BATCH = 32  # images at a time, for calibration and to rank nodes


class PrecisionError(RuntimeError):
    """A model that fails its check even with all of it in float32."""


class Reduction:
    """A model that is to be reduced to float16 or int8, and the ranges of its values on some images.

    `images`, in the form of the model's input, give the smallest and largest value of each tensor.
    """

    def __init__(self, model: bytes, precision: Reduced, images: np.ndarray):
        self.original, self.precision = _parse(model), precision
        operators = {node.op_type for node in self.original.graph.node} if precision == "fp16" else QUANTIZED
        self.ranges = _ranges(self.original, images, operators)

    def model(self, keep: Collection[str] = ()) -> bytes:
        """The reduced model; the nodes named in `keep` stay in float32.

        Float16: weights and computation in float16; input and output keep their types, and values between two nodes in
        float32 do not pass through float16. int8: int8 weights, with a scale for each output channel, and uint8
        activations.
        """
        reduce = _fp16 if self.precision == "fp16" else partial(_int8, ranges=self.ranges)
        return _finish(reduce(self.original, keep=keep), self.original)


def lowered(
    model: bytes, precision: Reduced, calibration: np.ndarray, check: Callable[[bytes], bool]
) -> tuple[bytes, list[str]]:
    """The model in lower precision with as much in float32 as `check` demands, and the names of the nodes that are.

    For fp16, all that `calibration` takes beyond float16's range stays in float32 from the start: ONNX Runtime on a CPU
    computes in float32 between float16 weights, so that a check there would not see it. Where `check` is false, groups
    of nodes are added, those first that change the logits most when they alone are reduced, in growing steps until
    `check` is true. `calibration` is the images of `Reduction`, and its first images also serve to rank the groups.
    Raises PrecisionError where `check` is false with all in float32 too.
    """
    reduction = Reduction(model, precision, calibration)
    original = reduction.original
    groups = _groups(original, precision)
    beyond = [precision == "fp16" and _beyond_fp16(original, reduction.ranges, group) for group in groups]
    ranked, count = sorted(range(len(groups)), key=lambda i: not beyond[i]), sum(beyond)
    measured = False
    while True:
        keep = [name for i in sorted(ranked[:count]) for name in groups[i]]
        reduced = reduction.model(keep)
        if check(reduced):
            return reduced, keep
        if count >= len(groups):
            raise PrecisionError(f"{precision}: the check fails even with all {len(keep)} nodes in float32")
        count = max(1, 2 * count)
        if not measured:
            errors = np.where(beyond, np.inf, _errors(model, calibration[:BATCH], groups, reduction.model))
            ranked = sorted(range(len(groups)), key=lambda i: -errors[i])
            count, measured = max(count, int(np.isinf(errors).sum())), True


def _parse(model: bytes) -> onnx.ModelProto:
    """The model with the types and shapes of all tensors."""
    parsed = onnx.shape_inference.infer_shapes(onnx.load_from_string(model), check_type=True, strict_mode=True)
    weights = {weight.name for weight in parsed.graph.initializer}
    others = [value for value in parsed.graph.value_info if value.name not in weights]  # float16.py takes all for casts
    del parsed.graph.value_info[:]
    parsed.graph.value_info.extend(others)
    return parsed


def _finish(reduced: onnx.ModelProto, original: onnx.ModelProto) -> bytes:
    """The reduced model in a valid order, with the metadata of the original, checked."""
    tidied = OnnxModel(reduced)
    tidied.prune_graph()
    tidied.topological_sort()
    del reduced.graph.value_info[:]  # some are there twice now, or of tensors that are gone
    del reduced.metadata_props[:]
    reduced.metadata_props.extend(original.metadata_props)
    return checked(reduced)


def _fp16(original: onnx.ModelProto, keep: Collection[str]) -> onnx.ModelProto:
    model = convert_float_to_float16(
        copy.deepcopy(original), keep_io_types=True, disable_shape_infer=True, node_block_list=list(keep)
    )
    made_by = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        source = made_by.get(node.input[0]) if _casts_to(node, onnx.TensorProto.FLOAT) else None
        if source is not None and _casts_to(source, onnx.TensorProto.FLOAT16):
            node.input[0] = source.input[0]  # from one node in float32 to another
    casts = {node.output[0]: node for node in model.graph.node}  # the converter repeats one for each node that reads it
    nodes = [node for node in model.graph.node if casts[node.output[0]] is node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _casts_to(node: onnx.NodeProto, kind: int) -> bool:
    return node.op_type == "Cast" and next(value.i for value in node.attribute if value.name == "to") == kind


def _ranges(original: onnx.ModelProto, images: np.ndarray, operators: Collection[str]) -> TensorsData:
    """The smallest and the largest value over all images of each float tensor that these operators read or write."""
    with tempfile.TemporaryDirectory(prefix="expertgrid-") as directory:
        path, augmented = Path(directory, "model.onnx"), Path(directory, "augmented.onnx")
        onnx.save(original, path)
        calibrator = create_calibrator(path, list(operators), str(augmented), CalibrationMethod.MinMax)
        batches = iter([{INPUT: images[i : i + BATCH]} for i in range(0, len(images), BATCH)])
        calibrator.collect_data(SimpleNamespace(get_next=lambda: next(batches, None)))
        return calibrator.compute_data()


def _int8(original: onnx.ModelProto, keep: Collection[str], ranges: TensorsData) -> onnx.ModelProto:
    """uint8 activations and int8 weights: the only pair that ONNX Runtime has fast convolutions for on x86.

    On an x86 processor without VNNI its sums of two products overflow 16 bits, so weights have 7 bits where a file is
    made on one: ONNX Runtime's advice, and half the noise in the logits.
    """
    quantizer = QDQQuantizer(
        copy.deepcopy(original),
        per_channel=True,
        reduce_range=platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_vnni_supported(),
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=ranges,
        nodes_to_quantize=[],
        nodes_to_exclude=list(keep),
        op_types_to_quantize=list(QUANTIZED),
        extra_options={
            "OpTypesToExcludeOutputQuantization": list(FLOAT_OUTPUT),
            "QDQKeepRemovableActivations": True,  # ONNX Runtime removes them when it loads; the names stay
        },
    )
    quantizer.quantize_model()
    return quantizer.model.model


def _groups(original: onnx.ModelProto, precision: Reduced) -> list[list[str]]:
    """The names of the nodes that a reduction changes: each heavy node with the light ones after it, in order.

    A light node with several inputs is with the last of the heavy nodes that they come from.
    """
    tensors = (*original.graph.value_info, *original.graph.output)
    floats = {tensor.name for tensor in tensors if tensor.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    groups: list[list[str]] = [[]]  # the first: what is before all heavy nodes
    group_of: dict[str, int] = {}  # by tensor
    for node in original.graph.node:
        group = max((group_of.get(name, 0) for name in node.input), default=0)
        if node.op_type in HEAVY:
            group = len(groups)
            groups.append([])
        group_of |= dict.fromkeys(node.output, group)
        if floats & set(node.output) and (precision == "fp16" or node.op_type in QUANTIZED):
            groups[group].append(node.name)
    return [group for group in groups if group]


def _beyond_fp16(original: onnx.ModelProto, ranges: TensorsData, group: Collection[str]) -> bool:
    """Whether the group's nodes read or write values, or have weights, that float16 might not hold."""
    nodes = [node for node in original.graph.node if node.name in group]
    names = {name for node in nodes for name in (*node.input, *node.output)}
    values = [ranges[name].range_value for name in names & set(ranges.keys())]
    floats = (tensor for tensor in original.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT)
    weights = [onnx.numpy_helper.to_array(tensor) for tensor in floats if tensor.name in names]
    return not all(np.abs(array).max(initial=0) < LARGEST for array in (*values, *weights) if array is not None)


def _errors(
    model: bytes, images: np.ndarray, groups: list[list[str]], reduce: Callable[[Collection[str]], bytes]
) -> list[float]:
    """For each group, the squared error that reducing it alone causes, relative to the logits'; infinite for NaN."""
    float_BN = _logits(model, images)
    errors = []
    for group in groups:
        others = {name for other in groups if other is not group for name in other}
        difference_BN = _logits(reduce(others), images) - float_BN
        errors.append(float((difference_BN**2).sum() / (float_BN**2).sum()))
    return np.nan_to_num(errors, nan=np.inf).tolist()


def _logits(model: bytes, images: np.ndarray) -> np.ndarray:
    return onnx_logits(open_session(model, "cpu", "the model in lower precision"), images, BATCH).astype(np.float64)
