"""Descriptions against the project's own counts and hand-made graphs."""

from functools import cache

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from small_networks import trained

from expertgrid.export.describe import Tensor, describe
from expertgrid.export.to_onnx import INPUT, to_onnx
from expertgrid.model.checkpoint import Checkpoint
from expertgrid.model.config import Block, Conv, ModelConfig, Pool, Residual
from expertgrid.model.cost import cost
from expertgrid.model.presets import network
from expertgrid.model.registry import build
from expertgrid.model.system.errors import InputError

SIZE = (24, 32)
MIXED = ModelConfig(
    layers=(
        Conv(channels=8, stride=2),
        Block(channels=8, kernels=(5, 3, 1)),
        Pool(),
        Residual(layers=(Block(channels=12, stride=2, norm_act="mix"), Block(channels=12, kernels=(3,)))),
    )
)


@cache
def exported(name: str) -> bytes:
    """The ONNX file of a preset or timm model with fresh weights."""
    config = MIXED if name == "mixed" else network(name)
    about = trained(model=name, classes=tuple("0123456789"), image_size=SIZE)
    return to_onnx(Checkpoint(config, about, build(config).state_dict()), "float")


class Images(CalibrationDataReader):
    def __init__(self):
        self.left = [{INPUT: np.random.default_rng(0).standard_normal((2, 3, *SIZE), dtype=np.float32)}]

    def get_next(self):
        return self.left.pop() if self.left else None


@pytest.fixture(scope="module", params=["QDQ", "QOperator"])
def quantized(request, tmp_path_factory) -> bytes:
    place = tmp_path_factory.mktemp("quantized")
    (place / "float.onnx").write_bytes(exported("two_block"))
    files = place / "float.onnx", place / "int8.onnx"
    quantize_static(*files, Images(), quant_format=QuantFormat[request.param])
    return files[1].read_bytes()


def model_of(nodes, inputs, outputs, held=(), opset: int = 20, **more) -> bytes:
    """An ONNX file of nodes; inputs and outputs are (name, shape), held is {name: array}."""
    values = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in some] for some in (inputs, outputs)]
    tensors = [numpy_helper.from_array(array, name) for name, array in dict(held).items()]
    graph = helper.make_graph(nodes, "graph", *values, tensors)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("elsewhere", 1)]
    return helper.make_model(graph, opset_imports=opsets, **more).SerializeToString()


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize("name", ["two_block", "mixed", "resnet10t"])
def test_macs_are_those_of_the_records(name):
    assert describe(exported(name), name).macs == cost(MIXED if name == "mixed" else network(name), *SIZE)[1]


def test_description_of_a_preset():
    model = exported("two_block")
    found = describe(model, "two_block.onnx")
    assert (found.name, found.file_bytes) == ("two_block.onnx", len(model))
    assert list(map(str, found.inputs)) == ["images: float32 batch×3×24×32"]
    assert list(map(str, found.outputs)) == ["logits: float32 batch×10"]
    assert found.operators["Conv"] == 9
    assert sum(found.operators.values()) == len(onnx.load_from_string(model).graph.node)
    assert list(found.operators.values()) == sorted(found.operators.values(), reverse=True)
    held = [numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(model).graph.initializer]
    assert found.parameters == sum(array.size for array in held)
    assert found.parameter_bytes == sum(array.nbytes for array in held)
    assert found.opsets[""] >= 18
    assert found.producer.startswith("pytorch")
    assert found.metadata["preset"] == "two_block"
    assert type(found).model_validate_json(found.model_dump_json()) == found
    assert "parameters" in str(found)
    assert f"{found.macs:,} for one image" in str(found)


def test_quantized_files_have_the_same_macs(quantized):
    plain, found = describe(exported("two_block"), "float"), describe(quantized, "int8")
    assert found.macs == plain.macs
    assert found.parameter_bytes < plain.parameter_bytes / 3
    assert {"QuantizeLinear", "DequantizeLinear"} < set(found.operators)


COUNTED = {
    "conv with groups": ("Conv", {"group": 2, "pads": [1, 1, 1, 1]}, zeros(6, 2, 3, 3), ("n", 4, 5, 7), 5 * 7 * 6 * 18),
    "conv with stride": ("Conv", {"strides": [2, 2]}, zeros(6, 4, 1, 1), ("n", 4, 5, 7), 3 * 4 * 6 * 4),
    "transposed conv": ("ConvTranspose", {"strides": [2, 2]}, zeros(4, 6, 2, 2), ("n", 4, 5, 7), 5 * 7 * 4 * 6 * 4),
    "gemm": ("Gemm", {"transB": 1}, zeros(3, 8), ("n", 8), 24),
    "gemm, transposed": ("Gemm", {"transA": 1}, zeros(8, 3), (8, 1), 24),
    "matmul": ("MatMul", {}, zeros(8, 3), ("n", 5, 8), 5 * 24),
    "einsum": ("Einsum", {"equation": "bik, kj -> bij"}, zeros(8, 3), ("n", 5, 8), 5 * 24),
    "a batch of 4": ("Conv", {}, zeros(6, 4, 1, 1), (4, 4, 5, 7), 5 * 7 * 24),
    "open height": ("Conv", {}, zeros(6, 4, 1, 1), ("n", 4, "h", 7), "the shapes of Conv 'it' are open"),
    "einsum with dots": ("Einsum", {"equation": "...k,kj->...j"}, zeros(8, 3), ("n", 8), "the shapes of Einsum"),
    "recurrent": ("RNN", {"hidden_size": 3}, zeros(1, 3, 8), ("n", 1, 8), "those of the operator RNN are not counted"),
    "another domain": ("Matrix", {"domain": "elsewhere"}, zeros(8, 3), ("n", 8), "operator elsewhere.Matrix are not"),
}  # fmt: skip


@pytest.mark.parametrize("case", COUNTED)
def test_macs_by_hand(case):
    operator, attributes, weight, shape, expected = COUNTED[case]
    node = helper.make_node(operator, ["x", "w"], ["y"], name="it", **attributes)
    if case == "gemm, transposed":
        expected *= 1 / 8  # eight rows, of which the first dimension is taken for the batch
    found = describe(model_of([node], [("x", shape)], [("y", None)], {"w": weight}), case)
    if isinstance(expected, str):
        assert found.macs is None
        assert expected in found.macs_unknown
        assert expected in str(found)
    else:
        assert (found.macs, found.macs_unknown) == (expected, "")


def test_bodies_are_counted():
    """In an If, whose bodies hold a constant and a product with a tensor from outside."""
    result = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
    product = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["r"])], "then", [], [result])
    constant = helper.make_node("Constant", [], ["r"], value=numpy_helper.from_array(zeros(2, 3)))
    other = helper.make_graph([constant], "else", [], [result])
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Cast", ["s"], ["c"], to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["y"], then_branch=product, else_branch=other),
    ]
    description = describe(model_of(nodes, [("x", ("n", 2))], [("y", None)], {"w": zeros(2, 3)}), "if")
    assert description.operators == {"ReduceSum": 1, "Cast": 1, "If": 1, "MatMul": 1}
    assert description.parameters == 12
    assert "the body of If" in description.macs_unknown


def test_functions_are_opened():
    add, opset = helper.make_node("Add", ["a", "a"], ["b"]), helper.make_opsetid("", 20)
    double = helper.make_function("elsewhere", "Double", ["a"], ["b"], [add], [opset])
    nodes = [helper.make_node("Double", [f"t{i}"], [f"t{i + 1}"], domain="elsewhere") for i in range(3)]
    model = model_of(nodes, [("t0", ("n", 2))], [("t3", ("n", 2))], functions=[double])
    assert describe(model, "functions").operators == {"Add": 3}


def test_small_types_and_text():
    held = [helper.make_tensor("four", TensorProto.INT4, (5,), [1, 2, 3, 4, 5])]
    held += [helper.make_tensor("text", TensorProto.STRING, (2,), [b"ab", b"c"])]
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in held]
    found = describe(model_of(nodes, [], [("text", (2,))], opset=21), "small")
    assert (found.parameters, found.parameter_bytes) == (7, 3 + 3)
    assert found.operators == {}


@pytest.mark.parametrize("content", [b"", b"no model", b"\x00\xff" * 50])
def test_bytes_that_are_not_onnx(content):
    with pytest.raises(InputError, match="broken.onnx: not an ONNX file"):
        describe(content, "broken.onnx")


def test_shapes_as_text():
    shapes = ("batch", 3, "?"), (), None
    texts = ["x: float32 batch×3×?", "x: float32 scalar", "x: float32 ?"]
    assert [str(Tensor(name="x", type="float32", shape=shape)) for shape in shapes] == texts
