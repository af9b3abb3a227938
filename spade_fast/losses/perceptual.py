"""The perceptual loss: fakes should look to VGG19, which was trained to name photographs, as reals
do.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn

from ..checkpoint import read
from ..checkpoint.parts import Source, differences
from ..kernels.contract import sum_dtype

FILE = "vgg19-dcbb9e9d.pth"  # torchvision's name for the weights of its VGG19
# The layers before each pooling: VGG19's sixteen convolutions (Simonyan and Zisserman 2015, E).
STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))  # channels, convolutions
WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)  # of relu1_1 to relu5_1
LEAST_SIZE = 16  # of an image: four poolings halve it


class VGG19(nn.Module):
    """VGG19 up to relu5_1: thirteen of its sixteen convolutions, with torchvision's key names,
    features.0.weight to features.28.bias, and weights that stay as they are.

    Args:
        weights: the path of a file, or a state_dict. What comes after relu5_1 is passed over.

    Raises:
        ValueError: the weights are those of something else; the message says what does not fit.
            Or it is no file of weights: see `checkpoint.read`.
    """

    def __init__(self, weights: Source):
        super().__init__()
        with torch.device("meta"):  # no random weights are drawn, only to be overwritten
            self.features = nn.Sequential(*_layers())
        given = read(weights)
        tensors = {key: tensor for key, tensor in given.items() if not _comes_later(key)}
        if wrong := differences(tensors, self.state_dict()):
            is_other = any(key.endswith("running_mean") for key in tensors)
            hint = " It has batch norms, as vgg19_bn has." if is_other else ""
            raise ValueError(
                f"weights are not torchvision's for VGG19 ({FILE}): {'; '.join(wrong)}.{hint}"
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

    It has no parameters that are trained. Images are between −1 and 1, and are not normalised as
    those were that VGG19 was trained on: nor are they in the published code. The published weight
    of 10 is not in it. float16 and bfloat16 are summed in float32.

    Args:
        weights: torchvision's file of VGG19's weights or a state_dict of them; None is the file in
            torch.hub's cache, if there is one. Nothing is ever downloaded or drawn at random.

    Raises:
        FileNotFoundError: there is no file; the message says which one should be where.
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
        """The loss, a scalar, of images [N, 3, H, W] between −1 and 1, of 16 pixels or more each
        way. Nothing flows back into `real`. Errors: ValueError, TypeError.
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
    """Whether a weight of torchvision's VGG19 is one of what comes after relu5_1."""
    later = r"(features\.(30|32|34)|classifier\.(0|3|6))\.(weight|bias)"
    return re.fullmatch(later, key) is not None


def _cached():
    """The file of VGG19's weights in torch.hub's cache."""
    folder = Path(torch.hub.get_dir(), "checkpoints")
    found = sorted(folder.glob("vgg19-*.pth"))
    if not found:
        raise FileNotFoundError(
            f"the perceptual loss needs torchvision's weights of VGG19, the file {FILE}: it should"
            f" be in {folder}, or --vgg-weights FILE should say where it is; --no-perceptual trains"
            " without this loss"
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{folder} has {names}: --vgg-weights FILE should say which it is")
    return found[0]


def _check_images(fake, real):
    for name, image in {"fake": fake, "real": real}.items():
        if not isinstance(image, torch.Tensor) or not image.is_floating_point():
            kind = getattr(image, "dtype", type(image).__name__)
            raise TypeError(f"{name} is {kind}, it should be a floating-point tensor")
        shape = list(image.shape)
        if len(shape) != 4 or shape[0] == 0 or shape[1] != 3 or min(shape[2:]) < LEAST_SIZE:
            raise ValueError(
                f"{name} has shape {shape}, it should be [N, 3, H, W] with {LEAST_SIZE} pixels or"
                " more each way"
            )
    if fake.shape != real.shape:
        raise ValueError(
            f"fake has shape {list(fake.shape)}, it should have real's, {list(real.shape)}"
        )
