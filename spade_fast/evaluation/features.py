"""Features of images, and the Fréchet distance between the features of two sets of images.

FID = |μ − ν|² + tr(Σ + T − 2·(ΣT)^½) for means μ, ν and covariances Σ, T of the features (Heusel et
al. 2017).
"""

import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from ..imported import theirs
from ..optional import needed
from .networks import SAME_TORCH, Network, first_line, given, sha256_of

INCEPTION = "inception"
FILE = (
    "pt_inception-2015-12-05-6726825d.pth"  # torch-fidelity's copy begins with "weights", not "pt"
)
FID = "Means and unbiased covariances are summed in float64."
DIMENSION = "2048"  # the published FID's features, after the last pooling


def load_features(features: str | nn.Module, weights: str | os.PathLike | None = None) -> Network:
    """The network that computes features.

    Args:
        features: "inception" for torch-fidelity's; or a module, or a MODULE:FUNCTION that returns
            one, from images uint8 [N, 3, H, W], RGB from 0 to 255, to floats [N, D].
        weights: Inception's file; None is the one in torch.hub's cache. It is never downloaded.

    Errors: ModuleNotFoundError without torch-fidelity, FileNotFoundError without the weights;
        ValueError, TypeError, Failed.
    """
    if features == INCEPTION:
        return _inception(weights)
    if weights is not None:
        raise ValueError(
            f"features_weights is {weights}; it should only be given with features {INCEPTION}"
        )
    return given("features", features, "my_project.networks:features")


class FrechetDistance:
    """FID, computed batch by batch. torchmetrics sums means and covariances, in float64."""

    def __init__(self, network: Network) -> None:
        self.network, self.dimension = network, 0
        self.metric: Any = None  # torchmetrics', once the dimension is known
        self.images = {True: 0, False: 0}

    @torch.no_grad()
    def add(self, images: torch.Tensor, real: bool) -> None:
        """Adds images, uint8 [N, 3, H, W]. Errors: ValueError, Failed."""
        with theirs("the features network failed"):
            found = self.network.module(images)
        self._check(found, len(images))
        if self.metric is None:
            self.dimension = found.shape[1]
            metrics = needed("torchmetrics.image.fid", "FID", f"torchmetrics {SAME_TORCH}")
            self.metric = metrics.FrechetInceptionDistance(feature=_Unchanged(self.dimension))
        self.metric.update(found.cpu().double(), real=real)
        self.images[real] += len(images)

    def compute(self) -> float:
        """The distance. Errors: ValueError if there are fewer than two images of either kind."""
        if min(self.images.values()) < 2:
            raise ValueError(
                f"there are {self.images[False]} generated images and {self.images[True]}"
                " photographs, FID should have at least two of each"
            )
        distance = self.metric.compute().item()
        if not math.isfinite(distance):
            raise ValueError(f"FID is {distance}, features should have smaller values")
        return distance

    def notes(self) -> list[str]:
        """A warning if there are too few images for covariances of full rank; else nothing."""
        least = min(self.images.values())
        if least > self.dimension:
            return []
        return [
            f"FID is computed from {self.images[False]} generated images and"
            f" {self.images[True]} photographs with {self.dimension} features each: covariances of"
            f" {least} images are singular, and FID is larger than with many images. Compare it"
            " only with FIDs of as many images."
        ]

    def _check(self, found, count):
        wanted = f"[{count}, {self.dimension or 'D'}]"
        if not isinstance(found, torch.Tensor) or not found.is_floating_point():
            kind = getattr(found, "dtype", type(found).__name__)
            raise ValueError(f"features returned {kind}; they should be floats {wanted}")
        shape = list(found.shape)
        if len(shape) != 2 or shape[0] != count or shape[1] == 0:
            raise ValueError(f"features returned shape {shape}; they should be {wanted}")
        if self.dimension not in (0, shape[1]):
            raise ValueError(f"features returned shape {shape}; they should be {wanted} as before")
        if not found.isfinite().all():
            raise ValueError("features returned values that are not finite")


class _Unchanged(nn.Module):
    """Takes the network's place in torchmetrics, which is given features already."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, features):
        return features


class _First(nn.Module):
    """The first result of torch-fidelity's network, which returns a tuple."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images)[0]


def _inception(weights):
    module = needed(
        "torch_fidelity.feature_extractor_inceptionv3",
        f"--features {INCEPTION}",
        f"torch-fidelity {SAME_TORCH}",
    )
    path = _cached() if weights is None else Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it should be the file {FILE}")
    try:
        network = module.FeatureExtractorInceptionV3("inception", [DIMENSION], str(path))
    except Exception as error:  # the type depends on the file's content
        raise ValueError(f"{path} is not the file {FILE}: {first_line(error)}") from error
    return Network(
        _First(network.eval()),
        {
            "network": f"torch-fidelity's InceptionV3, {DIMENSION} features",
            "weights_sha256": sha256_of(network),
            "resizing": "299 × 299 in the network, bilinear as TensorFlow 1 has it, no antialias",
        },
        ("torch-fidelity",),
    )


def _cached():
    """The file of Inception's weights in torch.hub's cache."""
    folder = Path(torch.hub.get_dir(), "checkpoints")
    found = sorted(folder.glob("*inception-2015-12-05-*.pth"))
    if len(found) != 1:
        has = ", ".join(path.name for path in found) or "none"
        raise FileNotFoundError(
            f"--features {INCEPTION} needs the file {FILE}: {folder} has {has}; it should have one,"
            " or --features-weights FILE should be given"
        )
    return found[0]
