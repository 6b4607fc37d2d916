"""A trained network as a folder in the layout of the Hugging Face Hub, which timm loads.

README.md            the model card, with its front matter
config.json          timm's: the architecture, its arguments, the classes, and how an image becomes the input
model.safetensors    the checkpoint as it was trained
*.onnx               the exported files, each with its certificate beside it

`timm.create_model` loads it, given "hf-hub:OWNER/NAME" or "local-dir:FOLDER", and `pretrained=True`. A network of timm
needs nothing else. A soft-expert network needs `import expertgrid.model`, which registers its architecture.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from expertgrid.model.checkpoint import Checkpoint
from expertgrid.model.config import ModelConfig
from expertgrid.model.registry import CLASSES, for_shapes, is_users
from expertgrid.model.system.errors import InputError, reason_of
from expertgrid.model.system.files import make_folder, sync_folder, sync_tree, write_whole

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
# What timm needs to fit a network to other images or classes.
OF_THE_ENDS = ("first_conv", "classifier", "fixed_input_size")
PUBLISHED = "; a network that is published is made by timm.models.build_model_with_cfg"
REGISTER = "from expertgrid.model.registry import register_networks  # `pip install .` in a checkout of expertgrid"
DATA_SETS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}  # the Hub's names of ours


def architecture(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]]:
    """timm's name of a network, without a tag, and the arguments that `timm.create_model` makes it with."""
    config = checkpoint.config
    if isinstance(config, ModelConfig):
        fields = config.model_dump(mode="json")
        arguments = {"config": fields, "in_chans": config.in_chans, "num_classes": config.num_classes}
        return "expertnet", arguments
    arguments = {"in_chans": config.in_chans, "num_classes": config.num_classes, **config.arguments}
    return config.timm.partition(".")[0], arguments


def timm_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The content of config.json. Raises InputError for a network that timm does not make."""
    name, arguments = architecture(checkpoint)
    trained, in_chans = checkpoint.trained, checkpoint.config.in_chans
    with for_shapes(checkpoint.config):
        try:
            net = timm.create_model(name, **arguments)
        except (ValueError, RuntimeError, TypeError) as error:
            raise InputError(f"model {name!r}: it cannot be made: {reason_of(error)}") from error
    own = getattr(net, "pretrained_cfg", {})
    return {
        "architecture": name,
        "num_classes": len(trained.classes),
        "num_features": getattr(net, "num_features", None),
        "model_args": arguments,
        "label_names": list(trained.classes),
        "pretrained_cfg": {
            "num_classes": len(trained.classes),
            "input_size": [in_chans, *trained.image_size],
            "crop_pct": 1.0,
            "crop_mode": "center",
            "interpolation": "bicubic",
            "mean": list(trained.mean),
            "std": list(trained.std),
            **{key: own[key] for key in OF_THE_ENDS if own.get(key)},
        },
    }


def front_matter(checkpoint: Checkpoint, accuracy: float, images: int) -> str:
    """The head of a card, which the Hub reads. `accuracy` is a share of the test images."""
    trained = checkpoint.trained
    hub_name = DATA_SETS.get(trained.data)
    data = {"name": trained.data, "type": hub_name or trained.data}
    metric = {"type": "accuracy", "value": accuracy, "name": f"accuracy on {images:,} test images"}
    result = {"task": {"type": "image-classification"}, "dataset": data, "metrics": [metric]}
    fields: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "onnx", "expertgrid"],
        **({"datasets": [hub_name]} if hub_name else {}),
        "metrics": ["accuracy"],
        "model-index": [{"name": trained.model, "results": [result]}],
    }
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()]  # JSON is YAML
    return "\n".join(["---", *lines, "---"])


def loading(checkpoint: Checkpoint, place: str) -> str:
    """Code that loads the folder with timm and says what it needs; `place` is what `timm.create_model` is given."""
    ours = isinstance(checkpoint.config, ModelConfig)
    needed = ["import expertgrid.model  # `pip install .` in a checkout of expertgrid"] if ours else []
    if is_users(checkpoint.config):
        name, _ = architecture(checkpoint)
        module = timm.models.model_entrypoint(name).__module__
        if name in CLASSES:
            needed += [f"import {module}  # your module", REGISTER, "", f"register_networks({module})"]
        else:
            needed.append(f"import {module}  # your module, which registers the network with timm")
    lines = ["import timm", *needed, "", f"net = timm.create_model({place!r}, pretrained=True).eval()"]
    lines.append("transform = timm.data.create_transform(**timm.data.resolve_data_config(model=net))")
    return "\n".join(["```python", *lines, "```"])


def check_loads(folder: Path, checkpoint: Checkpoint) -> None:
    """Loads a folder with timm. Raises InputError where it has not all weights of the checkpoint, to the last bit."""
    name, _ = architecture(checkpoint)
    try:
        weights = timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
    except Exception as error:  # a user's code may fail in any way
        raise InputError(f"model {name!r}: timm does not load its folder: {reason_of(error)}{PUBLISHED}") from error
    same = weights.keys() == checkpoint.weights.keys() and all(
        torch.equal(weights[key], weight) for key, weight in checkpoint.weights.items()
    )
    if not same:
        raise InputError(f"model {name!r}: timm makes it without the weights of the folder{PUBLISHED}")


def write_folder(
    folder: Path, checkpoint: Checkpoint, card: str, files: Sequence[Path], more: Mapping[str, bytes]
) -> None:
    """Writes a folder that is whole or not there at all; `files` are copied into it, `more` has content by name.

    Raises InputError where `folder` is there and not empty, and where timm does not load what is written.
    """
    check_free(folder)
    content = {
        CARD: card.encode(),
        CONFIG: json.dumps(timm_config(checkpoint), indent=1).encode(),
        WEIGHTS: checkpoint.to_bytes(),
        **{file.name: file.read_bytes() for file in files},
        **more,
    }
    make_folder(folder.absolute().parent)
    with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=f".{folder.name}.") as beside:
        made = Path(beside) / folder.name
        made.mkdir()
        for name, data in content.items():
            write_whole(made / name, data)
        check_loads(made, checkpoint)
        sync_tree(made)
        os.replace(made, folder)
    sync_folder(folder.absolute().parent)


def check_free(folder: Path) -> None:
    """Raises InputError for a place that is no folder, or one that holds something."""
    try:
        if not folder.exists() or not any(folder.iterdir()):
            return
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from None
    raise InputError(f"{folder}: is not empty; give a folder that is empty, or not there")


def upload(folder: Path, repository: str, private: bool) -> str:
    """Uploads a folder to `OWNER/NAME` of the Hugging Face Hub, in one commit, and returns its address.

    The repository is made where it is not there. The token is that of `hf auth login` or HF_TOKEN. Raises InputError
    where there is no network, no token, or no right to write.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)  # None: as its owner has it
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Publish a network of expertgrid")
    except Exception as error:  # of its HTTP library, which is another one in other versions, too
        raise InputError(
            f"hf-hub:{repository}: was not uploaded: {reason_of(error)}; a folder as TARGET needs no network, and "
            f"`hf upload {repository} FOLDER` uploads it later"
        ) from error
    return f"{api.endpoint}/{repository}"
