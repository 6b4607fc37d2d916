"""What an ONNX file holds, of whatever origin, in numbers."""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto
from onnx.inliner import inline_local_functions
from pydantic import BaseModel

from expertgrid.export.metadata import entries_of
from expertgrid.model.system.errors import printable, wrong_file
from expertgrid.model.system.files import opened_file, read_whole

Sizes = tuple[int | str, ...]  # a str is an open dimension, "?" where it has no name
Shape = Sizes | None  # None: not even the rank is known
Kind = TypeVar("Kind")

# What a quantized or fused operator is without scales, zero points and biases: its name, and the inputs that it keeps.
PLAIN = {
    **{f"QLinear{name}": (name, (0, 3)) for name in ("Conv", "MatMul", "Add", "Mul")},
    **{f"QLinear{name}": (name, (0,)) for name in ("Softmax", "Sigmoid", "LeakyRelu", "AveragePool")},
    **{f"{name}Integer": (name, (0, 1)) for name in ("Conv", "MatMul")},
    **{f"Fused{name}": (name, (0, 1)) for name in ("Conv", "Gemm")},
    "QLinearGlobalAveragePool": ("GlobalAveragePool", (0,)),
    "QGemm": ("Gemm", (0, 3)),
}
STANDARD = ("", "ai.onnx")  # domains
NOT_COUNTED = {"Attention", "DFT", "DeformConv", "GRU", "LSTM", "RNN", "STFT"}  # they multiply, but not as those below
NAMELESS = "unk__"  # how ONNX starts the names of dimensions that it does not know
LARGEST_MODEL = 2**31 - 1  # bytes of a message of protobuf
LARGEST_TENSOR = 2**28  # numbers, for one image
HIGHEST_RANK = 64  # of NumPy
MOST_EXPANDED = 2**28  # bytes of the nodes with all functions that they call, each with NODE_BYTES
NODE_BYTES = 256
DEEPEST_CALL = 100  # of functions, in ONNX
MOST_IN_VECTORS = 2**22  # numbers of all vectors, which may be shapes that are computed
PACKED_BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}


class Tensor(BaseModel):
    """An input or output of a model."""

    name: str
    type: str  # "uint8", "float32"; "sequence" and the like where it is no tensor, "undefined" where the file is silent
    shape: Shape

    def __str__(self) -> str:
        shape = "?" if self.shape is None else "×".join(map(str, self.shape)) or "scalar"
        return f"{self.name}: {self.type} {shape}"


class Description(BaseModel):
    """The numbers of an ONNX file. The bodies of If, Loop and Scan count once, functions wherever they are called."""

    name: str
    file_bytes: int
    inputs: list[Tensor]
    outputs: list[Tensor]
    opsets: dict[str, int]  # by domain; "" is that of the standard operators
    producer: str
    metadata: dict[str, str]
    operators: dict[str, int]  # the most frequent first; with their domain where it is not the standard one
    parameters: int  # the numbers in all tensors that the file holds, those for shapes and scales too
    parameter_bytes: int
    macs: int | None  # multiply-accumulates of convolutions and matrix products for one image, None if not known
    macs_unknown: str  # why not

    @property
    def opsets_in_words(self) -> str:
        return ", ".join(f"{domain or 'onnx'} {version}" for domain, version in self.opsets.items())

    @property
    def operators_in_words(self) -> str:
        return ", ".join(f"{count} {operator}" for operator, count in self.operators.items())

    def __str__(self) -> str:
        lines = [
            ("file", f"{self.name}, {self.file_bytes:,} bytes, from {self.producer or 'an unknown producer'}"),
            *(("input", tensor) for tensor in self.inputs),
            *(("output", tensor) for tensor in self.outputs),
            ("opset", self.opsets_in_words),
            ("parameters", f"{self.parameters:,} ({self.parameter_bytes:,} bytes)"),
            ("MACs", f"not known: {self.macs_unknown}" if self.macs is None else f"{self.macs:,} for one image"),
            ("operators", f"{sum(self.operators.values()):,}: {self.operators_in_words}"),
            *((key, value) for key, value in self.metadata.items()),
        ]
        width = max(len(title) for title, _ in lines)
        return printable("\n".join(f"{title:{width}}  {value}" for title, value in lines))


def describe(model: bytes, name: str) -> Description:
    """What an ONNX file holds; `name` is what the description and errors call it.

    Multiply-accumulates are those of a batch of one image, or one image's share where the file fixes a larger batch.
    Raises InputError for bytes that are not ONNX.
    """
    parsed = _inlined(_parsed(model, name), name)
    tensors = list(_messages(parsed, TensorProto))
    operators = Counter(
        _operator_name(node) for node in _messages(parsed.graph, NodeProto) if node.op_type != "Constant"
    )
    macs, macs_unknown = _macs(parsed)
    return Description(
        name=name,
        file_bytes=len(model),
        inputs=[_interface(value) for value in _inputs(parsed.graph)],
        outputs=[_interface(value) for value in parsed.graph.output],
        opsets={"" if opset.domain in STANDARD else opset.domain: opset.version for opset in parsed.opset_import},
        producer=f"{parsed.producer_name} {parsed.producer_version}".strip(),
        metadata=entries_of(parsed),
        operators=dict(operators.most_common()),
        parameters=sum(math.prod(tensor.dims) for tensor in tensors),
        parameter_bytes=sum(map(_bytes, tensors)),
        macs=macs,
        macs_unknown=macs_unknown,
    )


def read_onnx(path: Path) -> bytes:
    """The content of an ONNX file, with the values that it keeps in other files of its folder.

    Every command that is given an ONNX file opens it here. Raises InputError for a missing file, for content that is
    not ONNX, and for values that are kept in no file of its folder.
    """
    model = read_whole(path, LARGEST_MODEL)
    whole = _parsed(model, str(path))
    outside = [tensor for tensor in _messages(whole, TensorProto) if tensor.data_location == TensorProto.EXTERNAL]
    if not outside:
        return model
    total = len(model)
    for tensor in outside:
        file, offset, length = _place_of(tensor, path)
        total += length
        if total > LARGEST_MODEL:
            raise wrong_file(path, f"with its values it has more than {LARGEST_MODEL:,} bytes, which ONNX cannot hold")
        with opened_file(file) as opened:
            opened.seek(offset)
            tensor.raw_data = opened.read(length)
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]
    return whole.SerializeToString()


def _place_of(tensor: TensorProto, path: Path) -> tuple[Path, int, int]:
    """The file that has a tensor's values, and where in it they are: the offset and the number of bytes.

    Raises InputError for a file that is not in the folder of `path`, also where a link leads out of it.
    """
    said = {entry.key: entry.value for entry in tensor.external_data}
    location, folder = said.get("location", ""), path.resolve().parent
    where = f"the values of {tensor.name!r} are in {location!r}"
    if "\0" in location or not (folder / location).resolve().is_relative_to(folder) or Path(location).is_absolute():
        raise wrong_file(path, f"{where}; they are read from the folder of the ONNX file alone")
    file = folder / location
    if not file.is_file():
        raise wrong_file(path, f"{where}, and there is no such file")
    size = file.stat().st_size
    try:
        offset = int(said.get("offset", 0))
        length = int(said.get("length", size - offset))
    except ValueError:
        offset = length = -1
    if offset < 0 or length < 0 or offset + length > size:
        raise wrong_file(path, f"{where}, at no place that the file has: it has {size:,} bytes")
    return file, offset, length


def _messages(message: Any, kind: type[Kind]) -> Iterator[Kind]:
    """All messages of a kind that are in a message of protobuf, at any depth, and itself."""
    if isinstance(message, kind):
        yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for inner in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(inner, kind)


def _parsed(model: bytes, name: str) -> ModelProto:
    try:
        parsed = onnx.load_from_string(model)
    except Exception as error:  # protobuf's errors have no public type of their own
        raise wrong_file(name, f"not an ONNX file, or a damaged one ({type(error).__name__})") from None
    if any(isinstance(text, bytes) for text in _strings(parsed)):
        raise wrong_file(name, "not an ONNX file, or a damaged one (a name in it is not UTF-8)")
    if not parsed.graph.output:
        raise wrong_file(name, "not an ONNX file: it has no graph")
    _check_sizes(parsed, name)
    return parsed


def _check_sizes(model: ModelProto, name: str) -> None:
    """Raises InputError where the model would take a machine's memory, before anything of it is expanded or run."""
    types, values = set(TensorProto.DataType.values()), (*model.graph.input, *model.graph.output)
    if any(value.type.tensor_type.elem_type not in types for value in values) or any(
        tensor.data_type not in types - {TensorProto.UNDEFINED} for tensor in _messages(model, TensorProto)
    ):
        raise wrong_file(name, "not an ONNX file, or a damaged one (a tensor in it is of an unknown type)")
    functions = {(function.domain, function.name): function for function in model.functions}

    @cache
    def expanded(key: tuple[str, str], depth: int) -> float:
        """The bytes of a function with those that it calls."""
        return total(functions[key].node, depth + 1) if depth < DEEPEST_CALL else math.inf

    def total(nodes: Sequence[NodeProto], depth: int = 0) -> float:
        """The bytes of nodes with all functions that they call."""
        called = [(inner.domain, inner.op_type) for node in nodes for inner in _messages(node, NodeProto)]
        own = NODE_BYTES * len(called) + sum(node.ByteSize() for node in nodes)
        return own + sum(expanded(key, depth) for key in called if key in functions)

    if functions and total(model.graph.node) > MOST_EXPANDED:
        raise wrong_file(name, "its functions call each other too often, too deep, or themselves")
    vectors = 0
    for tensor, sizes in _shapes(_with_plain_operators(_inlined(model, name)), data_prop=False).items():
        known = [size for size in sizes if isinstance(size, int)]
        numbers = math.prod(known) if len(sizes) <= HIGHEST_RANK and min(known, default=0) >= 0 else math.inf
        vectors += numbers * (len(sizes) == 1)
        if numbers >= LARGEST_TENSOR or vectors > MOST_IN_VECTORS:
            shape = "x".join(map(str, sizes[:4])) + "..." * (len(sizes) > 4)
            raise wrong_file(name, f"its tensor {tensor!r} has too many numbers for one image: {shape}")


def _inlined(model: ModelProto, name: str) -> ModelProto:
    """The model with its functions written out where they are called."""
    try:
        return inline_local_functions(model) if model.functions else model
    except onnx.checker.ValidationError as error:
        raise wrong_file(name, f"not an ONNX file, or a damaged one ({str(error).splitlines()[0]})") from None


def _strings(model: ModelProto) -> Iterator[str | bytes]:
    """All texts in a model. protobuf gives those that are not UTF-8 as bytes."""
    messages: Iterator[Any] = _messages(model, object)
    for message in messages:
        for field, value in message.ListFields():
            if field.type == field.TYPE_STRING:
                yield from [value] if isinstance(value, str | bytes) else value


def _bytes(tensor: TensorProto) -> int:
    """The tensor's size, wherever its values are."""
    if tensor.data_type == TensorProto.STRING:
        return sum(map(len, tensor.string_data))
    type_name = TensorProto.DataType.Name(tensor.data_type)
    bits = PACKED_BITS.get(type_name) or 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return math.ceil(math.prod(tensor.dims) * bits / 8)


def _operator_name(node: NodeProto) -> str:
    return node.op_type if node.domain in STANDARD else f"{node.domain}.{node.op_type}"


def _inputs(graph: GraphProto) -> list[ValueInfoProto]:
    """The inputs that a caller gives; old files list initializers too."""
    initializers = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in initializers]


def _interface(value: ValueInfoProto) -> Tensor:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        return Tensor(name=value.name, type=(kind or "undefined").removesuffix("_type"), shape=None)
    name = TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
    return Tensor(name=value.name, type={"float": "float32", "double": "float64"}.get(name, name), shape=_shape(value))


def _shape(value: ValueInfoProto) -> Shape:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    sizes = (dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in tensor.shape.dim)
    return tuple("?" if str(size).startswith(NAMELESS) else size for size in sizes)


def _with_plain_operators(model: ModelProto) -> ModelProto:
    """A copy with plain operators in place of quantized and fused ones, so that ONNX can infer the shapes."""
    plain = copy.deepcopy(model)
    for node in plain.graph.node:
        if node.op_type in PLAIN:
            node.op_type, places = PLAIN[node.op_type]
            node.domain = ""
            inputs = [node.input[i] for i in places if i < len(node.input)]
            del node.input[:]
            node.input.extend(inputs)
    return plain


def _shapes(plain: ModelProto, data_prop: bool) -> dict[str, Sizes]:
    """Each tensor's shape, as inferred, else as the file states it; of those that have one.

    With `data_prop` from the numbers of vectors, too.
    """
    bare = copy.deepcopy(plain)
    del bare.graph.value_info[:]  # what it states may be out of date, and then nothing would be inferred
    try:
        bare = onnx.shape_inference.infer_shapes(bare, data_prop=data_prop)
    except onnx.shape_inference.InferenceError:
        bare = plain
    values = [*plain.graph.value_info, *bare.graph.value_info, *bare.graph.input, *bare.graph.output]
    shapes = {value.name: shape for value in values if (shape := _shape(value)) is not None}
    return shapes | {tensor.name: tuple(tensor.dims) for tensor in bare.graph.initializer}


def _close_batch(plain: ModelProto) -> int:
    """Closes the open batch dimension to one image, in place; returns the batch size that the file then has."""
    graph, batch, names = plain.graph, 1, set()
    for value in _inputs(graph):
        for dim in value.type.tensor_type.shape.dim[:1]:
            if dim.HasField("dim_value"):
                batch = max(batch, dim.dim_value)
            else:
                names |= {dim.dim_param} - {""}
                dim.dim_value = 1
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_value = 1
    return batch


def _macs(model: ModelProto) -> tuple[int | None, str]:
    """Multiply-accumulates for one image and "", or None and why they are not known."""
    plain = _with_plain_operators(model)
    batch = _close_batch(plain)
    shapes = _shapes(plain, data_prop=True)
    total = 0
    for node in plain.graph.node:
        if node.op_type in NOT_COUNTED or node.domain not in STANDARD:
            return None, f"those of the operator {_operator_name(node)} are not counted"
        if node.op_type in PRODUCTS:
            try:
                total += PRODUCTS[node.op_type](node, shapes)
            except (TypeError, KeyError, IndexError, ValueError):  # an open dimension, or a tensor without a shape
                return None, f"the shapes of {node.op_type} {node.name!r} are open"
        elif any(inner.op_type in PRODUCTS for inner in _messages(node, NodeProto)):
            return None, f"the body of {node.op_type} has some, and may run any number of times"
    return round(total / batch), ""


def _attribute(node: NodeProto, name: str) -> Any:
    """The value of a node's attribute, of the type that the operator gives it, or None where it has none."""
    return next((onnx.helper.get_attribute_value(value) for value in node.attribute if value.name == name), None)


def _size(shape: Sizes) -> int:
    """The product of a shape's numbers. Raises TypeError where one is open."""
    sizes = [size for size in shape if isinstance(size, int)]
    if len(sizes) < len(shape):
        raise TypeError(f"open shape {shape}")
    return math.prod(sizes)


def _gemm(node: NodeProto, shapes: dict[str, Sizes]) -> int:
    inner = shapes[node.input[0]][0 if _attribute(node, "transA") else 1]
    return _size((*shapes[node.output[0]], inner))


def _einsum(node: NodeProto, shapes: dict[str, Sizes]) -> int:
    """The products of two operands; one operand needs no product. Raises ValueError for more, and for an ellipsis."""
    terms = _attribute(node, "equation").decode().replace(" ", "").split("->")[0].split(",")
    if len(terms) == 1:
        return 0
    if len(terms) > 2 or any("." in term for term in terms):
        raise ValueError("an order of products is not given")
    sizes = {label: size for term, name in zip(terms, node.input) for label, size in zip(term, shapes[name])}
    return _size(tuple(sizes.values()))


# How many multiply-accumulates an operator has. A weight is (out, in / groups, kernel), a transposed one (in, out /
# groups, kernel).
PRODUCTS: dict[str, Callable[[NodeProto, dict[str, Sizes]], int]] = {
    "Conv": lambda node, shapes: _size((*shapes[node.output[0]], *shapes[node.input[1]][1:])),
    "ConvTranspose": lambda node, shapes: _size((*shapes[node.input[0]], *shapes[node.input[1]][1:])),
    "Gemm": _gemm,
    "MatMul": lambda node, shapes: _size((*shapes[node.output[0]], shapes[node.input[0]][-1])),
    "Einsum": _einsum,
}
