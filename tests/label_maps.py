"""Label maps for tests, and conditions with few distinct vectors."""

import torch
import torch.nn.functional as F

from spade_fast import SemanticLayout


def patches(shape, classes, seed=0):
    """Labels that are constant over patches, with some noise. The same on every device."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("cpu"):
        coarse = torch.randint(
            classes, (shape[0], 1, *(max(1, size // 4) for size in shape[1:])), generator=generator
        )
        labels = F.interpolate(coarse.float(), size=shape[1:], mode="nearest")[:, 0].long()
        noise = torch.rand(shape, generator=generator) < 0.03
        labels = torch.where(noise, torch.randint(classes, shape, generator=generator), labels)
    return labels.to(torch.get_default_device())


SHAPES = [(2, 17), (1, 1), (2, 9, 14), (1, 1, 6), (3, 4, 1), (2, 5, 4, 6), (1, 40, 33)]


LABEL_NC = 6


def layout_of(shape, seed=0):
    """A layout of patches of 5 classes, whose borders are instances' edges: 6 channels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(
        LABEL_NC - 1, (shape[0], *[-(-length // 16) for length in shape[1:]]), generator=generator
    )
    for dim, length in enumerate(shape[1:], start=1):
        labels = labels.repeat_interleave(16, dim).narrow(dim, 0, length)
    return SemanticLayout.from_labels(labels, LABEL_NC - 1, labels)
