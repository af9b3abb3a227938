"""The perceptual loss: fakes should have the same features as reals in VGG19, a classifier of
photographs.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn

from ..checkpoint import read
from ..checkpoint.parts import Source, differences
from ..kernels.contract import sum_dtype

FILE = "vgg19-dcbb9e9d.pth"  # torchvision's file of VGG19's weights
# The layers before each pooling: VGG19's sixteen convolutions (Simonyan and Zisserman 2015, E).
STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))  # channels, convolutions
WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)  # of relu1_1 to relu5_1
LEAST_SIZE = 16  # of an image: four poolings halve it


class VGG19(nn.Module):
    """VGG19 up to relu5_1: thirteen of its sixteen convolutions, with torchvision's key names,
    features.0.weight to features.28.bias, and weights that are not trained.

    Args:
        weights: the path of a file, or a state_dict. Layers after relu5_1 are ignored.

    Raises:
        ValueError: the weights belong to another network; the message says what does not fit. Or
            the file does not contain weights: see `checkpoint.read`.
    """

    def __init__(self, weights: Source):
        super().__init__()
        with torch.device("meta"):  # does not draw random weights that would be overwritten
            self.features = nn.Sequential(*_layers())
        given = read(weights)
        tensors = {key: tensor for key, tensor in given.items() if not _comes_later(key)}
        if wrong := differences(tensors, self.state_dict()):
            is_other = any(key.endswith("running_mean") for key in tensors)
            hint = " They have batch norms, like those of vgg19_bn." if is_other else ""
            raise ValueError(
                f"weights are not torchvision's of VGG19 ({FILE}): {'; '.join(wrong)}.{hint}"
            )
        dtype = torch.get_default_dtype()
        self.load_state_dict(
            {key: tensor.detach().to(dtype, copy=True) for key, tensor in tensors.items()},
            assign=True,
        )
        self.requires_grad_(False)

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """The results of relu1_1, relu2_1, relu3_1, relu4_1 and relu5_1 for images [N, 3, H, W]."""
        results, x, is_first = [], image, True
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU) and is_first:
                results.append(x)
            if not isinstance(layer, nn.Conv2d):
                is_first = isinstance(layer, nn.MaxPool2d)
        return results


class Perceptual(nn.Module):
    """Σ_i w_i · mean|φ_i(fake) − φ_i(real)| over relu1_1 to relu5_1 of VGG19, w = 1/32, 1/16, 1/8,
    1/4, 1 (Johnson et al. 2016; weighted as in Wang et al. 2018 and the published code of SPADE).

    It has no trainable parameters. Images are between −1 and 1. As in the published code, they are
    not normalised the way that VGG19's training images were. The published weight of 10 is not
    included. float16 and bfloat16 are summed in float32.

    Args:
        weights: torchvision's file of VGG19's weights or a state_dict of them; None is the file in
            torch.hub's cache. Weights are never downloaded or drawn at random.

    Raises:
        FileNotFoundError: the file is missing; the message says which one it is, and where it
            should be.
        ValueError: the weights are not those of VGG19.
    """

    __call__: Callable[..., torch.Tensor]  # nn.Module's returns Any

    def __init__(self, weights: Source | None = None):
        super().__init__()
        self.vgg = VGG19(_cached() if weights is None else weights).eval()

    def train(self, mode: bool = True) -> "Perceptual":
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar, of images [N, 3, H, W] between −1 and 1, with H and W at least 16. No
        gradients flow to `real`. Errors: ValueError, TypeError.
        """
        _check_images(fake, real)
        with torch.no_grad():
            wanted = self.vgg(real)
        distances = [
            weight * (one - other).abs().mean(dtype=sum_dtype(one.dtype))
            for weight, one, other in zip(WEIGHTS, self.vgg(fake), wanted)
        ]
        return torch.stack(distances).sum()


def _layers():
    """Convolutions, ReLUs and poolings up to relu5_1, at their places in torchvision's VGG19."""
    before = 3
    for number, (width, convolutions) in enumerate(STAGES):
        if number > 0:
            yield nn.MaxPool2d(2)
        for _ in range(convolutions if number < len(STAGES) - 1 else 1):
            yield nn.Conv2d(before, width, 3, padding=1)
            yield nn.ReLU(inplace=True)
            before = width


def _comes_later(key):
    """Whether a weight of torchvision's VGG19 belongs to a layer after relu5_1."""
    later = r"(features\.(30|32|34)|classifier\.(0|3|6))\.(weight|bias)"
    return re.fullmatch(later, key) is not None


def _cached():
    """The file of VGG19's weights in torch.hub's cache."""
    folder = Path(torch.hub.get_dir(), "checkpoints")
    found = sorted(folder.glob("vgg19-*.pth"))
    if not found:
        raise FileNotFoundError(
            f"the perceptual loss needs torchvision's weights of VGG19, the file {FILE}: it should"
            f" be in {folder}, or be given as --vgg-weights FILE; --no-perceptual trains without"
            " this loss"
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{folder} has {names}: --vgg-weights FILE should say which to use")
    return found[0]


def _check_images(fake, real):
    for name, image in {"fake": fake, "real": real}.items():
        if not isinstance(image, torch.Tensor) or not image.is_floating_point():
            kind = getattr(image, "dtype", type(image).__name__)
            raise TypeError(f"{name} is {kind}; it should be a floating-point tensor")
        shape = list(image.shape)
        if len(shape) != 4 or shape[0] == 0 or shape[1] != 3 or min(shape[2:]) < LEAST_SIZE:
            raise ValueError(
                f"{name} has shape {shape}; it should be [N, 3, H, W] with H and W at least"
                f" {LEAST_SIZE}"
            )
    if fake.shape != real.shape:
        raise ValueError(
            f"fake has shape {list(fake.shape)}; it should be that of real, {list(real.shape)}"
        )
