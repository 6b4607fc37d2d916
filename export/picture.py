"""A picture of an ONNX file's graph, of whatever origin, as SVG.

A box is a run of operators, each of which has no other consumer than the next; a row is an operator.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from onnx import GraphProto, NodeProto

from export.graph import (
    PLAIN,
    Sizes,
    attribute,
    bodies,
    graphs,
    inputs_of,
    interface,
    operator_name,
    parse,
    shape_text,
    shapes_of,
    with_plain_operators,
)

if TYPE_CHECKING:
    from grandalf.graphs import Edge
    from grandalf.layouts import SugiyamaLayout


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
    """A box that grandalf places: it reads the size from `w` and `h`, and writes the centre to `xy`."""

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
    from grandalf.graphs import Edge, Graph, Vertex
    from grandalf.layouts import SugiyamaLayout

    parsed = parse(model, name)
    units = _units(parsed.graph, shapes_of(with_plain_operators(parsed)))
    boxes, edges = _boxes(units)
    vertices = [Vertex(box) for box in boxes]
    # ty: `view` is how grandalf is given a size and gives a place, and its classes do not declare it
    for vertex, box in zip(vertices, boxes):
        vertex.view = box  # ty: ignore[missing-attribute]
    links = [Edge(vertices[i], vertices[j]) for i, j in edges]
    for link in links:
        link.view = _Line()  # ty: ignore[missing-attribute]
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


def _units(graph: GraphProto, shapes: dict[str, Sizes]) -> list[_Unit]:
    """What is drawn, producers before consumers: the inputs, the nodes that depend on one, and the outputs."""
    constant = {tensor.name for tensor in graph.initializer} | {
        tensor.values.name for tensor in graph.sparse_initializer
    }
    outputs = {value.name for value in graph.output}
    units = []
    for value in inputs_of(graph):
        tensor = interface(value)
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
        tensor = interface(value)
        row = _Row(tensor.name, f"{tensor.type} {shape_text(tensor.shape)}", INTERFACE, "output")
        units.append(_Unit(row, [value.name], []))
    return units


def _captured(node: NodeProto) -> list[str]:
    """The names that the node's bodies take from outside, and names of their own among them."""
    inner_graphs = [graph for body in bodies(node) for graph in graphs(body)]
    taken = [name for graph in inner_graphs for inner in graph.node for name in inner.input]
    return taken + [value.name for graph in inner_graphs for value in graph.output]


def _operator_row(node: NodeProto, shapes: dict[str, Sizes]) -> _Row:
    text = operator_name(node)
    kernel = attribute(node, "kernel_shape")
    if kernel is None and PLAIN.get(node.op_type, (node.op_type, ()))[0] == "Conv":
        kernel = shapes.get(node.input[3 if node.op_type == "QLinearConv" else 1]) or ()
        kernel = kernel[2:]
    if kernel:
        text += f" {shape_text(tuple(kernel))}"
    strides = attribute(node, "strides", [])
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
    points = edge.view.points  # ty: ignore[missing-attribute]
    spans = [(x, y - height_at[y] / 2, y + height_at[y] / 2) for x, y in points]
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
