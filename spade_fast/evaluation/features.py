"""Features of images, and the Fréchet distance between those of two sets of images.

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
from .networks import Network, first_line, given, needed, sha256_of

INCEPTION = "inception"
FILE = "pt_inception-2015-12-05-6726825d.pth"  # torch-fidelity's has "weights" for "pt"
FID = "Means and unbiased covariances are summed in float64."
DIMENSION = "2048"  # the features that FID is published with: after the last pooling


def load_features(features: str | nn.Module, weights: str | os.PathLike | None = None) -> Network:
    """The network of features.

    Args:
        features: "inception", torch-fidelity's; or MODULE:FUNCTION or a module, which takes images
            uint8 [N, 3, H, W], RGB from 0 to 255, and returns floats [N, D].
        weights: Inception's file; None is the one in torch.hub's cache. It is never downloaded.

    Errors: ModuleNotFoundError without torch-fidelity, FileNotFoundError without its file;
        ValueError, TypeError, Failed.
    """
    if features == INCEPTION:
        return _inception(weights)
    if weights is not None:
        raise ValueError(
            f"features_weights is {weights}, it should be given with features {INCEPTION} only"
        )
    return given("features", features, "my_project.networks:features")


class FrechetDistance:
    """FID, from features in batches. Sums and covariances are torchmetrics', in float64."""

    def __init__(self, network: Network) -> None:
        self.network, self.dimension = network, 0
        self.metric: Any = None  # torchmetrics', once the dimension is known
        self.images = {True: 0, False: 0}

    @torch.no_grad()
    def add(self, images: torch.Tensor, real: bool) -> None:
        """Adds images, uint8 [N, 3, H, W]. Errors: ValueError, Failed."""
        with theirs("the network of features failed"):
            found = self.network.module(images)
        self._check(found, len(images))
        if self.metric is None:
            self.dimension = found.shape[1]
            frechet = needed("torchmetrics.image.fid", "FID").FrechetInceptionDistance
            self.metric = frechet(feature=_Unchanged(self.dimension))
        self.metric.update(found.cpu().double(), real=real)
        self.images[real] += len(images)

    def compute(self) -> float:
        """The distance. Errors: ValueError where there are less than two images of one kind."""
        if min(self.images.values()) < 2:
            raise ValueError(
                f"there are {self.images[False]} generated images and {self.images[True]}"
                " photographs, FID should have two of each at least"
            )
        distance = self.metric.compute().item()
        if not math.isfinite(distance):
            raise ValueError(f"FID is {distance}: features should have smaller values")
        return distance

    def notes(self) -> list[str]:
        """A warning where there are too few images for covariances of full rank, or none."""
        least = min(self.images.values())
        if least > self.dimension:
            return []
        return [
            f"FID is of {self.images[False]} generated images and {self.images[True]} photographs,"
            f" and has {self.dimension} features: covariances of {least} images are singular, and"
            " FID is larger than with many. It says something beside FIDs of as many images only."
        ]

    def _check(self, found, count):
        wanted = f"[{count}, {self.dimension or 'D'}]"
        if not isinstance(found, torch.Tensor) or not found.is_floating_point():
            kind = getattr(found, "dtype", type(found).__name__)
            raise ValueError(f"features returned {kind}, they should be floats {wanted}")
        shape = list(found.shape)
        if len(shape) != 2 or shape[0] != count or shape[1] == 0:
            raise ValueError(f"features returned shape {shape}, they should be {wanted}")
        if self.dimension not in (0, shape[1]):
            raise ValueError(f"features returned shape {shape}, they should be {wanted} as before")
        if not found.isfinite().all():
            raise ValueError("features returned values that are not finite")


class _Unchanged(nn.Module):
    """Stands where torchmetrics wants the network: it is given features already."""

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
    module = needed("torch_fidelity.feature_extractor_inceptionv3", f"--features {INCEPTION}")
    path = _cached() if weights is None else Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there, it should be the file {FILE}")
    try:
        network = module.FeatureExtractorInceptionV3("inception", [DIMENSION], str(path))
    except Exception as error:  # of any type: it depends on the file's content
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
            f"--features {INCEPTION} needs the file {FILE}: {folder} has {has}, it should have one,"
            " or --features-weights FILE should say where it is"
        )
    return found[0]
