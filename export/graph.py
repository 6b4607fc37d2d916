"""What an ONNX file holds, of whatever origin: its numbers, and a picture of its graph."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from xml.etree import ElementTree

import onnx
from grandalf.graphs import Edge, Graph, Vertex
from grandalf.layouts import SugiyamaLayout
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto
from onnx.inliner import inline_local_functions
from pydantic import BaseModel

from model.errors import InputError

Shape = tuple[int | str, ...] | None  # a str is an open dimension, "?" where it has no name; None: not even the rank

# What a quantized or fused operator is when scales, zero points and biases are left out: its name, the inputs it keeps.
PLAIN = {
    "QLinearConv": ("Conv", (0, 3)),
    "ConvInteger": ("Conv", (0, 1)),
    "FusedConv": ("Conv", (0, 1)),
    "QLinearMatMul": ("MatMul", (0, 3)),
    "MatMulInteger": ("MatMul", (0, 1)),
    "QGemm": ("Gemm", (0, 3)),
    "FusedGemm": ("Gemm", (0, 1)),
    "QLinearAdd": ("Add", (0, 3)),
    "QLinearMul": ("Mul", (0, 3)),
    "QLinearSoftmax": ("Softmax", (0,)),
    "QLinearSigmoid": ("Sigmoid", (0,)),
    "QLinearLeakyRelu": ("LeakyRelu", (0,)),
    "QLinearAveragePool": ("AveragePool", (0,)),
    "QLinearGlobalAveragePool": ("GlobalAveragePool", (0,)),
}
STANDARD = ("", "ai.onnx")  # domains
NOT_COUNTED = {"Attention", "DFT", "DeformConv", "GRU", "LSTM", "RNN", "STFT"}  # they multiply, but not as those below
NAMELESS = "unk__"  # how ONNX starts the names of dimensions that it does not know
PACKED_BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}


class Tensor(BaseModel):
    """An input or output of a model."""

    name: str
    type: str  # "uint8", "float32"; "sequence" and the like where it is no tensor, "undefined" where the file is silent
    shape: Shape

    def __str__(self) -> str:
        return f"{self.name}: {self.type} {shape_text(self.shape)}"


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

    def __str__(self) -> str:
        opsets = ", ".join(f"{domain or 'onnx'} {version}" for domain, version in self.opsets.items())
        operators = ", ".join(f"{count} {operator}" for operator, count in self.operators.items())
        lines = [
            ("file", f"{self.name}, {self.file_bytes:,} bytes, from {self.producer or 'an unknown producer'}"),
            *(("input", tensor) for tensor in self.inputs),
            *(("output", tensor) for tensor in self.outputs),
            ("opset", opsets),
            ("parameters", f"{self.parameters:,} ({self.parameter_bytes:,} bytes)"),
            ("MACs", f"not known: {self.macs_unknown}" if self.macs is None else f"{self.macs:,} for one image"),
            ("operators", f"{sum(self.operators.values()):,}: {operators}"),
            *((key, value) for key, value in self.metadata.items()),
        ]
        width = max(len(title) for title, _ in lines)
        return "\n".join(f"{title:{width}}  {value}" for title, value in lines)


def shape_text(shape: Shape) -> str:
    """A shape as people read it: "batch×64×32×32", "scalar", "?" where not even the rank is known."""
    return "?" if shape is None else "×".join(map(str, shape)) or "scalar"


def describe(model: bytes, name: str) -> Description:
    """What an ONNX file holds; `name` is what the description and errors call it.

    Multiply-accumulates are those of a batch of one image, or one image's share where the file fixes a larger batch.
    Raises InputError for bytes that are not ONNX.
    """
    parsed = _parse(model, name)
    graphs = list(_graphs(parsed.graph))
    tensors = [tensor for graph in graphs for tensor in _tensors(graph)]
    operators = Counter(_operator(node) for graph in graphs for node in graph.node if node.op_type != "Constant")
    macs, macs_unknown = _macs(parsed)
    return Description(
        name=name,
        file_bytes=len(model),
        inputs=[_interface(value) for value in _inputs(parsed.graph)],
        outputs=[_interface(value) for value in parsed.graph.output],
        opsets={"" if one.domain in STANDARD else one.domain: one.version for one in parsed.opset_import},
        producer=f"{parsed.producer_name} {parsed.producer_version}".strip(),
        metadata={prop.key: prop.value for prop in parsed.metadata_props},
        operators=dict(operators.most_common()),
        parameters=sum(math.prod(tensor.dims) for tensor in tensors),
        parameter_bytes=sum(map(_bytes, tensors)),
        macs=macs,
        macs_unknown=macs_unknown,
    )


def _parse(model: bytes, name: str) -> ModelProto:
    try:
        parsed = onnx.load_from_string(model)
    except Exception as error:  # protobuf's errors have no public type of their own
        raise InputError(f"{name}: not an ONNX file, or a damaged one ({type(error).__name__})") from None
    if not parsed.graph.output:
        raise InputError(f"{name}: not an ONNX file, or one without a graph")
    return inline_local_functions(parsed) if parsed.functions else parsed


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph, and the bodies of its nodes."""
    yield graph
    for node in graph.node:
        for body in _bodies(node):
            yield from _graphs(body)


def _bodies(node: NodeProto) -> list[GraphProto]:
    return [body for attribute in node.attribute for body in (attribute.g, *attribute.graphs) if body.output]


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """The tensors that the graph holds: initializers and constants."""
    yield from graph.initializer
    yield from (sparse.values for sparse in graph.sparse_initializer)
    yield from (
        attribute.sparse_tensor.values if attribute.name == "sparse_value" else attribute.t
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name in ("value", "sparse_value")
    )


def _bytes(tensor: TensorProto) -> int:
    """The tensor's size, wherever its values are."""
    if tensor.data_type == TensorProto.STRING:
        return sum(map(len, tensor.string_data))
    type_name = TensorProto.DataType.Name(tensor.data_type)
    bits = PACKED_BITS.get(type_name) or 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return math.ceil(math.prod(tensor.dims) * bits / 8)


def _operator(node: NodeProto) -> str:
    return node.op_type if node.domain in STANDARD else f"{node.domain}.{node.op_type}"


def _inputs(graph: GraphProto) -> list[ValueInfoProto]:
    """The inputs that a caller gives; old files list initializers too."""
    held = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in held]


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
    return tuple(dim.dim_value if dim.HasField("dim_value") else _dimension(dim.dim_param) for dim in tensor.shape.dim)


def _dimension(name: str) -> str:
    return "?" if not name or name.startswith(NAMELESS) else name


def _plain(model: ModelProto) -> ModelProto:
    """A copy with quantized and fused operators as the plain ones, of which ONNX can infer the shapes."""
    plain = ModelProto()
    plain.CopyFrom(model)
    for node in plain.graph.node:
        if node.op_type in PLAIN:
            node.op_type, kept = PLAIN[node.op_type]
            node.domain = ""
            inputs = [node.input[i] for i in kept if i < len(node.input)]
            del node.input[:]
            node.input.extend(inputs)
    return plain


def _shapes(plain: ModelProto) -> dict[str, Shape]:
    """Each tensor's shape, as inferred, else as the file states it; of those that have one."""
    bare = ModelProto()
    bare.CopyFrom(plain)
    del bare.graph.value_info[:]  # what it states may be out of date, and then nothing would be inferred
    try:
        bare = onnx.shape_inference.infer_shapes(bare, data_prop=True)
    except onnx.shape_inference.InferenceError:
        bare = plain
    values = [*plain.graph.value_info, *bare.graph.value_info, *bare.graph.input, *bare.graph.output]
    found = {value.name: _shape(value) for value in values if _shape(value) is not None}
    return found | {tensor.name: tuple(tensor.dims) for tensor in bare.graph.initializer}


def _one_image(plain: ModelProto) -> int:
    """Closes the open batch dimension to one image, in place; returns the batch size that the file then has."""
    graph, batch = plain.graph, 1
    names = set()
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
    plain = _plain(model)
    batch = _one_image(plain)
    shapes = _shapes(plain)
    total = 0
    for node in plain.graph.node:
        if node.op_type in NOT_COUNTED or node.domain not in STANDARD:
            return None, f"those of the operator {_operator(node)} are not counted"
        if any(body_node.op_type in _PRODUCTS for body in _bodies(node) for g in _graphs(body) for body_node in g.node):
            return None, f"the body of {node.op_type} has some, and may run any number of times"
        if node.op_type in _PRODUCTS:
            try:
                total += _PRODUCTS[node.op_type](node, shapes)
            except (TypeError, KeyError, IndexError, ValueError):  # an open dimension, or a tensor without a shape
                return None, f"the shapes of {node.op_type} {node.name!r} are open"
    return round(total / batch), ""


def _attribute(node: NodeProto, name: str, default: object = None) -> object:
    found = [onnx.helper.get_attribute_value(one) for one in node.attribute if one.name == name]
    return found[0] if found else default


def _size(shape: Shape) -> int:
    """The product of a shape's numbers. Raises TypeError where one is open."""
    if not all(isinstance(size, int) for size in shape):
        raise TypeError(f"open shape {shape}")
    return math.prod(shape)


def _conv(node: NodeProto, shapes: dict[str, Shape]) -> int:
    return _size(shapes[node.output[0]]) * _size(shapes[node.input[1]][1:])  # weight: out, in / groups, kernel


def _conv_transpose(node: NodeProto, shapes: dict[str, Shape]) -> int:
    return _size(shapes[node.input[0]]) * _size(shapes[node.input[1]][1:])  # weight: in, out / groups, kernel


def _gemm(node: NodeProto, shapes: dict[str, Shape]) -> int:
    inner = shapes[node.input[0]][0 if _attribute(node, "transA") else 1]
    return _size((*shapes[node.output[0]], inner))


def _matmul(node: NodeProto, shapes: dict[str, Shape]) -> int:
    return _size((*shapes[node.output[0]], shapes[node.input[0]][-1]))


def _einsum(node: NodeProto, shapes: dict[str, Shape]) -> int:
    """Of two operands; of one there are none. Raises ValueError for more, and for an ellipsis."""
    terms = _attribute(node, "equation").decode().replace(" ", "").split("->")[0].split(",")
    if len(terms) == 1:
        return 0
    if len(terms) > 2 or any("." in term for term in terms):
        raise ValueError("an order of products is not given")
    sizes = {label: size for term, name in zip(terms, node.input) for label, size in zip(term, shapes[name])}
    return _size(tuple(sizes.values()))


_PRODUCTS = {"Conv": _conv, "ConvTranspose": _conv_transpose, "Gemm": _gemm, "MatMul": _matmul, "Einsum": _einsum}


# The picture. A box is a run of operators, each of which has no other consumer than the next; a row is an operator.

KINDS = {  # colour, operators
    "convolution": ("#9ecae9", {"Conv", "ConvTranspose", "DeformConv"}),
    "matrix product": ("#c5b0e6", {"Attention", "Einsum", "GRU", "Gemm", "LSTM", "MatMul", "RNN"}),
    "activation": (
        "#f9c49a",
        {"Celu", "Clip", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "LogSoftmax", "Mish", "PRelu",
         "Relu", "Selu", "Sigmoid", "Softmax", "Softplus", "Swish", "Tanh"},
    ),
    "arithmetic": ("#a9dba6", {"Add", "Div", "Exp", "Log", "Mul", "Neg", "Pow", "Sqrt", "Sub", "Sum", "Where"}),
    "pooling": (
        "#f4a9a8",
        {"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool", "ReduceMax", "ReduceMean", "ReduceSum"},
    ),
    "normalisation": (
        "#efe08f",
        {"BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LRN"},
    ),
    "quantization": ("#a3d9d5", {"DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"}),
    "shape": (
        "#dfe3e8",
        {"Cast", "Concat", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Shape", "Slice", "Split",
         "Squeeze", "Tile", "Transpose", "Unsqueeze"},
    ),
    "other": ("#ffffff", set()),
    "input or output": ("#3d4852", set()),
}  # fmt: skip
INTERFACE = "input or output"
FONT_SIZE, CHARACTER, ROW, PAD = 12, 7.25, 20, 8  # pixels; of a monospaced font
BETWEEN_BOXES, BETWEEN_LAYERS, MARGIN, LEGEND, ARROW = 14, 26, 20, 36, 5
LAYOUT_ROUNDS = 4
STYLE = f"""
text {{ font: {FONT_SIZE}px "DejaVu Sans Mono", Menlo, Consolas, monospace; fill: #1b1f23; white-space: pre; }}
.shape {{ text-anchor: end; fill-opacity: 0.75; }}
.row {{ stroke: #ffffff; stroke-width: 0.5; }}
.box {{ fill: none; stroke: #5c6670; stroke-width: 1; }}
.edge {{ fill: none; stroke: #5c6670; stroke-width: 1.2; marker-end: url(#arrow); }}
"""


@dataclass
class _Row:
    """A line of a box: an operator, or an input or output of the model."""

    text: str
    shape: str
    kind: str
    hint: str  # shown under the pointer

    @property
    def width(self) -> float:
        return CHARACTER * (len(self.text) + len(self.shape) + 2) + 2 * PAD


@dataclass
class _Box:
    """What grandalf places: it wants the sizes as `w` and `h` and writes the centre to `xy`."""

    rows: list[_Row] = field(default_factory=list)
    xy: tuple[float, float] = (0, 0)

    @property
    def w(self) -> float:
        return max(row.width for row in self.rows)

    @property
    def h(self) -> float:
        return ROW * len(self.rows)


@dataclass
class _Line:
    """An edge's way, as grandalf gives it: the centres of its two boxes, and between them a point in each layer."""

    points: list[tuple[float, float]] = field(default_factory=list)

    def setpath(self, points: list[tuple[float, float]]) -> None:
        self.points = points


@dataclass
class _Unit:
    """An input, operator or output, with the tensors that it takes and gives."""

    row: _Row
    takes: list[str]
    gives: list[str]


def draw(model: bytes, name: str = "the model") -> bytes:
    """An SVG picture of an ONNX file's graph, from top to bottom.

    Constants are left out, and what is computed from constants alone. Operators that follow one another without a
    branch share a box. Raises InputError, naming `name`, for bytes that are not ONNX.
    """
    parsed = _parse(model, name)
    units = _units(parsed.graph, _shapes(_plain(parsed)))
    boxes, edges = _boxes(units)
    vertices = [Vertex(box) for box in boxes]
    for vertex, box in zip(vertices, boxes):
        vertex.view = box
    links = [Edge(vertices[i], vertices[j]) for i, j in edges]
    for link in links:
        link.view = _Line()
    drawing, right, bottom = ElementTree.Element("g"), MARGIN, 0.0
    for part in Graph(vertices, links).C:
        layout = SugiyamaLayout(part)
        layout.xspace, layout.yspace = BETWEEN_BOXES, BETWEEN_LAYERS
        layout.dw = layout.dh = 1  # of the points where an edge passes a layer
        layout.init_all()
        layout.draw(LAYOUT_ROUNDS)
        width, height = _add_part(drawing, layout, right)
        right, bottom = right + width + MARGIN, max(bottom, height)
    return _svg(drawing, {row.kind for box in boxes for row in box.rows}, right, bottom)


def _units(graph: GraphProto, shapes: dict[str, Shape]) -> list[_Unit]:
    """What is drawn, producers before consumers: the inputs, the nodes that depend on one, and the outputs."""
    constant = {tensor.name for tensor in graph.initializer} | {one.values.name for one in graph.sparse_initializer}
    outputs = {value.name for value in graph.output}
    units = []
    for value in _inputs(graph):
        tensor = _interface(value)
        row = _Row(tensor.name, f"{tensor.type} {shape_text(tensor.shape)}", INTERFACE, "input")
        units.append(_Unit(row, [], [value.name]))
    for node in graph.node:
        takes = [name for name in (*node.input, *_captured(node)) if name and name not in constant]
        known = node.op_type == "Constant" or (len(node.input) > 0 and not takes)
        if known and not outputs & set(node.output):
            constant |= set(node.output)
        else:
            units.append(_Unit(_operator_row(node, shapes), takes, list(node.output)))
    for value in graph.output:
        tensor = _interface(value)
        row = _Row(tensor.name, f"{tensor.type} {shape_text(tensor.shape)}", INTERFACE, "output")
        units.append(_Unit(row, [value.name], []))
    return units


def _captured(node: NodeProto) -> list[str]:
    """The names that the node's bodies take from outside, and names of their own among them."""
    graphs = [graph for body in _bodies(node) for graph in _graphs(body)]
    return [name for graph in graphs for inner in graph.node for name in inner.input] + [
        value.name for graph in graphs for value in graph.output
    ]


def _operator_row(node: NodeProto, shapes: dict[str, Shape]) -> _Row:
    text = _operator(node)
    kernel = _attribute(node, "kernel_shape")
    if kernel is None and PLAIN.get(node.op_type, (node.op_type, ()))[0] == "Conv":
        kernel = shapes.get(node.input[3 if node.op_type == "QLinearConv" else 1]) or ()
        kernel = kernel[2:]
    if kernel:
        text += f" {shape_text(tuple(kernel))}"
    strides = _attribute(node, "strides", [])
    if any(stride > 1 for stride in strides):
        text += f" /{strides[0] if len(set(strides)) == 1 else shape_text(tuple(strides))}"
    plain = PLAIN.get(node.op_type, (node.op_type, ()))[0]
    kind = next((kind for kind, (_, operators) in KINDS.items() if plain in operators), "other")
    return _Row(text, shape_text(shapes.get(node.output[0])) if node.output else "", kind, node.name)


def _boxes(units: list[_Unit]) -> tuple[list[_Box], list[tuple[int, int]]]:
    """The boxes, and the edges between them by their numbers."""
    producer = {name: i for i, unit in enumerate(units) for name in unit.gives if name}
    sources = [sorted({producer[name] for name in unit.takes if name in producer}) for unit in units]
    consumers: list[list[int]] = [[] for _ in units]
    for i, found in enumerate(sources):
        for source in found:
            consumers[source].append(i)
    boxes: list[_Box] = []
    box_of: list[int] = []
    for i, unit in enumerate(units):
        before = sources[i][0] if len(sources[i]) == 1 else None
        follows = before is not None and consumers[before] == [i]
        if not follows or INTERFACE in (unit.row.kind, units[before].row.kind):
            box_of.append(len(boxes))
            boxes.append(_Box())
        else:
            box_of.append(box_of[before])
        boxes[box_of[i]].rows.append(unit.row)
    edges = {(box_of[source], box_of[i]) for i, found in enumerate(sources) for source in found}
    return boxes, sorted((a, b) for a, b in edges if a != b)


def _add_part(drawing: ElementTree.Element, layout: SugiyamaLayout, left: float) -> tuple[float, float]:
    """Adds a connected part of the graph, from `left` on, and returns its width and height in pixels."""
    boxes = [vertex.view for vertex in layout.g.sV]
    lines = [edge.view.points for edge in layout.g.sE]
    first = min([box.xy[0] - box.w / 2 for box in boxes] + [x for points in lines for x, _ in points])
    last = max([box.xy[0] + box.w / 2 for box in boxes] + [x for points in lines for x, _ in points])
    height_at = {layer[0].view.xy[1]: max(vertex.view.h for vertex in layer) for layer in layout.layers}
    part = ElementTree.SubElement(drawing, "g", transform=f"translate({left - first:.1f} {MARGIN})")
    for edge in layout.g.sE:
        ElementTree.SubElement(part, "path", d=_way(edge, height_at), attrib={"class": "edge"})
    for box in boxes:
        _add_box(part, box)
    return last - first, max(box.xy[1] + box.h / 2 for box in boxes) + MARGIN


def _way(edge: Edge, height_at: dict[float, float]) -> str:
    """The path of an edge: straight down through the layers, curved between them, so that it crosses no box."""
    upper, lower = (vertex.view for vertex in edge.v)
    spans = [(x, y - height_at[y] / 2, y + height_at[y] / 2) for x, y in edge.view.points]
    x, _, y = spans[0]
    path = f"M{x:.1f} {upper.xy[1] + upper.h / 2:.1f} V{y:.1f}"
    for span in spans[1:]:
        next_x, top, bottom = span
        is_last = span is spans[-1]
        top -= ARROW if is_last else 0
        middle = (y + top) / 2
        path += f" C{x:.1f} {middle:.1f} {next_x:.1f} {middle:.1f} {next_x:.1f} {top:.1f}"
        y = lower.xy[1] - lower.h / 2 - ARROW if is_last else bottom
        path += f" V{y:.1f}" if y > top else ""
        x = next_x
    return path


def _add_box(part: ElementTree.Element, box: _Box) -> None:
    left, top = box.xy[0] - box.w / 2, box.xy[1] - box.h / 2
    for row in box.rows:
        shown = ElementTree.SubElement(part, "g")
        if row.hint:
            ElementTree.SubElement(shown, "title").text = _printable(row.hint)
        colour = KINDS[row.kind][0]
        place = {"x": f"{left:.1f}", "y": f"{top:.1f}", "width": f"{box.w:.1f}", "height": str(ROW)}
        ElementTree.SubElement(shown, "rect", place | {"fill": colour, "class": "row"})
        baseline = f"{top + 14:.1f}"
        ink = {"style": "fill: #ffffff; fill-opacity: 1"} if row.kind == INTERFACE else {}
        ElementTree.SubElement(shown, "text", {"x": f"{left + PAD:.1f}", "y": baseline} | ink).text = _printable(
            row.text
        )
        at_right = {"x": f"{left + box.w - PAD:.1f}", "y": baseline, "class": "shape"} | ink
        ElementTree.SubElement(shown, "text", at_right).text = _printable(row.shape)
        top += ROW
    outline = {
        "x": f"{left:.1f}",
        "y": f"{box.xy[1] - box.h / 2:.1f}",
        "width": f"{box.w:.1f}",
        "height": f"{box.h:.1f}",
    }
    ElementTree.SubElement(part, "rect", outline | {"class": "box"})


def _printable(text: str) -> str:
    """Without the characters that XML cannot hold."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _svg(drawing: ElementTree.Element, kinds: set[str], width: float, height: float) -> bytes:
    """The whole picture: the drawing under a legend of the kinds that are in it."""
    legend, x = ElementTree.Element("g"), float(MARGIN)
    for kind in (kind for kind in KINDS if kind in kinds):
        swatch = {"x": f"{x:.1f}", "y": str(MARGIN), "width": "14", "height": "14", "class": "box"}
        ElementTree.SubElement(legend, "rect", swatch, style=f"fill: {KINDS[kind][0]}")
        ElementTree.SubElement(legend, "text", x=f"{x + 20:.1f}", y=str(MARGIN + 11)).text = kind
        x += 20 + CHARACTER * len(kind) + 2 * PAD
    width, height = max(width, x), height + MARGIN + LEGEND
    svg = ElementTree.Element(
        "svg",
        xmlns="http://www.w3.org/2000/svg",
        width=f"{width:.0f}",
        height=f"{height:.0f}",
        viewBox=f"0 0 {width:.0f} {height:.0f}",
    )
    ElementTree.SubElement(svg, "style").text = STYLE
    marker = {"id": "arrow", "viewBox": "0 0 6 6", "refX": "0", "refY": "3", "markerWidth": "6", "markerHeight": "6"}
    marker |= {"orient": "auto", "markerUnits": "userSpaceOnUse"}
    arrow = ElementTree.SubElement(ElementTree.SubElement(svg, "defs"), "marker", marker)
    ElementTree.SubElement(arrow, "path", d="M0 0 L6 3 L0 6 Z", fill="#5c6670")
    ElementTree.SubElement(svg, "rect", width="100%", height="100%", fill="#ffffff")
    svg.append(legend)
    drawing.set("transform", f"translate(0 {LEGEND})")
    svg.append(drawing)
    return ElementTree.tostring(svg, encoding="utf-8", xml_declaration=True)
