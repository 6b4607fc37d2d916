"""The proof that an exported model is the network that was trained: both run on every test image.

At one batch size the model runs on all images, and at the others, where an engine may take other kernels, on a sample.

Shapes: B images, N classes.
"""

import hashlib
from collections.abc import Iterator, Sequence
from importlib.metadata import version

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from expertgrid.export.certificate import BOUNDS, Agreement, Certificate
from expertgrid.export.mcnemar import mcnemar
from expertgrid.export.metadata import AS_IT_IS, Options, Precision
from expertgrid.export.session import Session, open_any, run
from expertgrid.export.to_onnx import INPUT, LOGITS, NAME_SCOPES
from expertgrid.model.gates import recorded

BATCH = 64  # of PyTorch, and of the model on all images
SAMPLED_BATCHES = (1, 2, 7)
SAMPLE = 1_000  # images
EXPORTED = "the exported model"
DIVERGED = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2, "int8": 0.2}  # relative to the largest value of a layer's output


def compare(
    model: bytes,
    net: nn.Module,
    images: np.ndarray,
    labels_B: np.ndarray,
    precision: Precision = "fp32",
    providers: Sequence[str] = ("cpu",),
    pytorch_BN: np.ndarray | None = None,
    options: Options = AS_IT_IS,
) -> Certificate:
    """The certificate of `model`: it runs in its engines, and `net` in PyTorch, on all `images`, which both take.

    At the SAMPLED_BATCHES the model runs on every k-th image, so that there are SAMPLE of them or up to twice as many.

    `pytorch_BN` is what `pytorch_logits` gave for them, where that was computed before. PyTorch computes in fp32 on the
    CPU, and ONNX Runtime on CUDA without TF32; what is allowed is in `BOUNDS`. Raises InputError where a provider is
    missing.
    """
    sessions = {name: open_any(model, name, EXPORTED, precision, True, options) for name in providers}
    pytorch_BN = pytorch_logits(net, images) if pytorch_BN is None else pytorch_BN
    every = max(1, len(images) // SAMPLE)
    agreements = [
        _agreement(onnx_logits(session, images[::step], batch), pytorch_BN, labels_B, step, provider, batch)
        for provider, session in sessions.items()
        for batch, step in ((BATCH, 1), *((batch, every) for batch in SAMPLED_BATCHES))
    ]
    accuracy = float((pytorch_BN.argmax(1) == labels_B).mean())
    apart = [agreement.provider for agreement in agreements if not agreement.within(BOUNDS[precision])]
    opsets = {opset.domain: opset.version for opset in onnx.load_from_string(model).opset_import}
    return Certificate(
        passed=not apart,
        precision=precision,
        bound=BOUNDS[precision],
        images=len(images),
        pytorch_accuracy=accuracy,
        agreements=agreements,
        first_divergence=first_divergence(model, net, images[:BATCH], precision, apart[0], options) if apart else "",
        sha256=hashlib.sha256(model).hexdigest(),
        opset=opsets[""],
        versions={"torch": torch.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
        | ({"openvino": version("openvino")} if "openvino" in providers else {}),
    )


@torch.inference_mode()
def pytorch_logits(net: nn.Module, images: np.ndarray) -> np.ndarray:
    """PyTorch's logits (B, N) of all images."""
    return np.concatenate([net(torch.from_numpy(part)).numpy() for part in _batches(images, BATCH)])


def onnx_logits(session: Session, images: np.ndarray, batch: int) -> np.ndarray:
    """A session's logits (B, N) of all images, `batch` at a time."""
    return np.concatenate([run(session, [LOGITS], {INPUT: part})[0] for part in _batches(images, batch)])


def _batches(images: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    return (images[i : i + batch] for i in range(0, len(images), batch))


def _agreement(
    onnx_BN: np.ndarray, pytorch_BN: np.ndarray, labels_B: np.ndarray, every: int, provider: str, batch: int
) -> Agreement:
    """Compares the logits of ONNX Runtime for every `every`-th image with those of PyTorch for all."""
    pytorch_BN, labels_B = pytorch_BN[::every], labels_B[::every]
    difference_BN = np.abs(onnx_BN.astype(np.float64) - pytorch_BN)
    difference_BN[np.isnan(difference_BN)] = np.inf
    onnx_right_B, pytorch_right_B = onnx_BN.argmax(1) == labels_B, pytorch_BN.argmax(1) == labels_B
    return Agreement(
        provider=provider,
        batch=batch,
        images=len(labels_B),
        sampled=every > 1,
        largest_difference=float(difference_BN.max()),
        mean_difference=float(difference_BN.mean()),
        argmax_flips=(every * np.flatnonzero(onnx_BN.argmax(1) != pytorch_BN.argmax(1))).tolist(),
        accuracy=float(onnx_right_B.mean()),
        pytorch_accuracy=float(pytorch_right_B.mean()),
        mcnemar_p=mcnemar(onnx_right_B, pytorch_right_B).exact_p,
    )


def layer_outputs(model: onnx.ModelProto) -> dict[str, str]:
    """The tensor that leaves each layer of the network, by the layer's name, which the exporter notes in the nodes."""
    tensors: dict[str, str] = {}
    for node in model.graph.node:
        scopes = {prop.key: prop.value for prop in node.metadata_props}.get(NAME_SCOPES, "")
        for scope in scopes.replace("'", '"').strip('[]"').split('", "'):
            name = scope.removeprefix("net.")
            if name.startswith("layers.") and name.count(".") == 1:
                tensors[name] = node.output[0]
    return tensors


@torch.inference_mode()
def first_divergence(
    model: bytes,
    net: nn.Module,
    images: np.ndarray,
    precision: Precision,
    provider: str,
    options: Options = AS_IT_IS,
) -> str:
    """The first layer whose output differs by more than DIVERGED on the provider, relative to its largest value.

    "the head" where all layers agree, "an unknown layer" for a model whose nodes do not say where they come from.
    """
    proto = onnx.load_from_string(model)
    tensors = layer_outputs(proto)
    if not tensors:
        return "an unknown layer"
    proto.graph.output.extend(onnx.ValueInfoProto(name=tensor) for tensor in tensors.values())
    session = open_any(proto.SerializeToString(), provider, EXPORTED, precision, True, options)
    onnx_outputs = dict(zip(tensors, run(session, list(tensors.values()), {INPUT: images})))
    modules = {name.removeprefix("net."): module for name, module in net.named_modules()}
    with recorded({name: modules[name] for name in tensors}) as pytorch_outputs:
        net(torch.from_numpy(images))
    for name, onnx_output in onnx_outputs.items():
        expected = pytorch_outputs[name][0].numpy()
        difference = np.abs(onnx_output.astype(np.float64) - expected).max() / max(np.abs(expected).max(), 1e-12)
        if not difference <= DIVERGED[precision]:
            return name
    return "the head"
