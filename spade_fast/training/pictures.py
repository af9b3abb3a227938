"""Pictures of a run: the layouts of some scenes, the generated images, and the photographs."""

import contextlib
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from ..data import Example, collate, colours, paint
from ..layout import SemanticLayout

GAP = 4  # white pixels between images; three times as many between scenes
SEED = 0  # of the z of generated images, which is the same in every picture


class Scenes:
    """The scenes that all pictures of a run show.

    examples: of the same size, with one image each.
    """

    def __init__(self, examples: Sequence[Example], sizes: Sequence = (), kernel_size: int = 3):
        self.batches = [collate([example], sizes, kernel_size) for example in examples]

    def generated(self, generator: nn.Module, encoder: nn.Module | None = None) -> torch.Tensor:
        """The generator's images [N, 3, H, W] on the CPU, in float32. If there is an encoder, z is
        the mean that it computes from the photograph.
        """
        parameter = next(generator.parameters())
        random, images = torch.Generator().manual_seed(SEED), []
        z_dim = getattr(generator, "z_dim", None)
        for batch in self.batches:
            batch = batch.to(parameter.device)
            z = None
            if encoder is not None:
                with in_eval_mode(encoder), torch.no_grad():
                    z = encoder(batch.images)[0]
            elif z_dim is not None:
                z = torch.randn(1, z_dim, generator=random).to(parameter)
            with torch.no_grad():
                image = generator(batch.layout, z) if z is not None else generator(batch.layout)
            images.append(image.float().cpu())
        return torch.cat(images)

    def distance(self, generated: torch.Tensor, perceptual: nn.Module | None) -> float:
        """The mean distance of the generated images from the photographs: the perceptual loss if it
        is given, else the mean absolute difference.
        """
        found = []
        for image, batch in zip(generated.split(1), self.batches):
            if perceptual is None:
                found.append(F.l1_loss(image, batch.images))
            else:
                device = next(iter(perceptual.state_dict().values())).device
                with torch.no_grad():
                    found.append(perceptual(image.to(device), batch.images.to(device)))
        return float(torch.stack(found).mean())

    def grid(self, generated: torch.Tensor) -> np.ndarray:
        """A picture, uint8 [H, W, 3], with each scene's layout, generated image and photograph side
        by side. The number of columns makes it about square.
        """
        scenes = [
            side_by_side([layout_picture(batch.layout), picture(image), picture(batch.images[0])])
            for image, batch in zip(generated, self.batches)
        ]
        columns = math.ceil(math.sqrt(len(scenes) / 3))
        scenes += [np.full_like(scenes[0], 255)] * (-len(scenes) % columns)
        rows = [
            side_by_side(scenes[first : first + columns], gap=3 * GAP)
            for first in range(0, len(scenes), columns)
        ]
        return side_by_side(rows, axis=0)


@contextlib.contextmanager
def in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Inside, the network is in eval mode, so that calls do not change its buffers."""
    before = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(before)


def picture(image: torch.Tensor) -> np.ndarray:
    """An image [3, H, W] between −1 and 1 as uint8 [H, W, 3]."""
    return ((image.movedim(0, -1).clamp(-1, 1) + 1) * 127.5).round().byte().numpy()


def layout_picture(layout: SemanticLayout) -> np.ndarray:
    """The first image's classes in colours and instances' edges in white, uint8 [H, W, 3]."""
    palette = layout.palette.cpu()
    codes = layout.codes[0].cpu().numpy()
    classes = palette.argmax(dim=1).numpy()
    is_edge = (palette.sum(dim=1) > 1).numpy()  # both a class and the channel of edges
    image = paint(classes[codes], colours(layout.label_nc))
    image[is_edge[codes]] = 255
    return image


def side_by_side(images: Sequence[np.ndarray], axis: int = 1, gap: int = GAP) -> np.ndarray:
    """Images of the same size in a row (axis 1) or column (axis 0), with white pixels between."""
    parts = []
    for image in images:
        shape = list(image.shape)
        shape[axis] = gap
        parts += [image, np.full(shape, 255, np.uint8)]
    return np.concatenate(parts[:-1], axis)
