"""A picture of a recipe's augmentation: a row for each image, first as it is, then as each epoch shows it."""

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from expertgrid.model.system.errors import InputError
from expertgrid.model.training.data import ImageData
from expertgrid.model.training.loader import Batch, Loader
from expertgrid.model.training.recipe import Recipe
from expertgrid.model.training.splits import Split, Splits

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

DRAWS = 8  # epochs shown
TILE = 112  # pixels of the longer side at least
LINE, GAP, FONT = 15, 8, 12
CAPTIONS = 2  # lines under a tile


def contact_sheet(recipe: Recipe, data: ImageData, seed: int, images: int) -> Image.Image:
    """A picture of `images` random train images as the network sees them in the first epochs of the recipe.

    The batches are of the `Loader` that trains, over these images only. The normalisation is undone, and pixels are
    clipped. Under each image is its class, or the classes that are mixed in it with their shares. Raises InputError
    where the data have fewer train images.
    """
    if images > len(data.train):
        raise InputError(f"--images {images}: {data.name} has {len(data.train)} images to train on")
    train, test = (Split.of(images, torch.device("cpu")) for images in (data.train, data.test))
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:images]
    few = Splits(data, train.part(chosen), test, test)
    loader = Loader(recipe.model_copy(update={"batch_size": images}), few, seed)
    columns = [[(pixels, [data.classes[label]]) for pixels, label in zip(few.train.pixels(), few.train.labels_B)]]
    columns += [_column(batch, loader, data) for epoch in range(DRAWS) for batch in loader.epoch(epoch)]

    height, width = data.image_size
    scale = max(1, -(-TILE // max(height, width)))
    step_x, step_y = width * scale + GAP, height * scale + CAPTIONS * LINE + GAP
    sheet = Image.new("RGB", (len(columns) * step_x + GAP, images * step_y + LINE + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT)
    for i, column in enumerate(columns):
        x = GAP + i * step_x
        draw.text((x, GAP // 2), "original" if i == 0 else f"epoch {i}", "black", font)
        for j, (pixels_HWC, captions) in enumerate(column):
            y = LINE + GAP + j * step_y
            grey = pixels_HWC.shape[2] == 1
            tile = Image.fromarray((pixels_HWC[..., 0] if grey else pixels_HWC[..., :3]).numpy())
            size = width * scale, height * scale
            sheet.paste(tile.convert("RGB").resize(size, Image.Resampling.NEAREST), (x, y))
            for line, caption in enumerate(captions):
                text = _shortened(caption, size[0], draw, font)
                draw.text((x, y + size[1] + 1 + line * LINE), text, "black", font)
    return sheet


def _column(batch: Batch, loader: Loader, data: ImageData) -> list[tuple[Tensor, list[str]]]:
    """Pixels (H, W, C) and captions of a batch, in the order of the images in the split."""
    x_BCHW = batch.x_BCHW * loader.std_C[:, None, None] + loader.mean_C[:, None, None]
    pixels_BHWC = (x_BCHW.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    captions = []
    for target in batch.targets:
        if target.ndim == 0:
            captions.append([data.classes[target]])
        else:
            largest = zip(*map(Tensor.tolist, target.topk(CAPTIONS)))
            captions.append([f"{share:.0%} {data.classes[label]}" for share, label in largest if share >= 0.005])
    order = batch.indices_B.argsort()
    return [(pixels_BHWC[i], captions[i]) for i in order]


def _shortened(text: str, width: int, draw: ImageDraw.ImageDraw, font: Font) -> str:
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(f"{text}…", font) > width:
        text = text[:-1]
    return f"{text}…"
