"""The case `converted`: other people's models, before and after `spade_fast.convert`."""

import functools

import torch
import torch.nn as nn
import torch.nn.functional as F

from spade_fast import reference

from .networks import COCO_NORM, converted_problem, with_converted
from .problem import BACKWARD, FORWARD, name_of, plan_of
from .scenes import conditions, scene_size


def converted(settings):
    """Other people's models, before and after `spade_fast.convert`: the published generator, and
    LivePortrait's decoder of features.
    """
    size = scene_size(settings)

    @functools.lru_cache(1)  # shared by both modes
    def inputs(make):
        torch.manual_seed(0)
        network, segmaps = make()
        return with_converted(network), segmaps

    def generator():
        ngf, segmaps = 8 if settings.quick else 64, list(conditions(settings))
        return reference.SPADEGenerator(184, ngf, crop_size=size, norm_G=COCO_NORM), segmaps

    def decoder():
        network = FaceDecoder(*((16, 8, 8) if settings.quick else (512, 256, 64)))
        pixels = [8 if settings.quick else 64] * 2
        return network, [
            torch.randn(settings.batch, network.fc.in_channels, *pixels)
            for _ in range(settings.scenes)
        ]

    def build(settings, name, mode, make):
        return converted_problem(settings, name, mode, *inputs(make), bare=("limit",))

    for name, make in {f"COCO {size}²": generator, "LivePortrait's decoder": decoder}.items():
        for mode in (FORWARD, BACKWARD):
            yield plan_of(build, settings, name_of(settings, name), mode, make)


class FaceDecoder(nn.Module):
    """A network with the shapes of LivePortrait's decoder: from features [N, 256, 64, 64], which
    are also the condition of every SPADE, to an image at 512².
    """

    def __init__(self, wide, middle, narrow):
        super().__init__()
        self.fc = nn.Conv2d(wide // 2, wide, 3, padding=1)
        pairs = [(wide, wide)] * 6 + [(wide, middle), (middle, narrow)]
        self.blocks = nn.ModuleList(
            reference.SPADEResnetBlock(*pair, "spadespectralinstance3x3", wide // 2)
            for pair in pairs
        )
        self.conv_img = nn.Conv2d(narrow, 12, 3, padding=1)

    def forward(self, features):
        x = self.fc(features)
        for number, block in enumerate(self.blocks):
            x = block(x if number < 6 else F.interpolate(x, scale_factor=2), features)
        return torch.sigmoid(F.pixel_shuffle(self.conv_img(F.leaky_relu(x, 0.2)), 2))
