"""The case `discriminator`: the published discriminator in training."""

import torch

import spade_fast
from spade_fast import reference

from .networks import network_problem
from .problem import BACKWARD, name_of, plan_of
from .scenes import conditions, scene_size


def discriminator(settings):
    """The published discriminator in training, on a fake and a real image of a COCO layout at 256²
    in one batch, with all gradients.
    """

    def build(settings, name, mode):
        segmaps, arguments = list(conditions(settings)), (187, 2, 8 if settings.quick else 64)
        torch.manual_seed(0)
        images = torch.randn(2 * settings.batch, 3, *segmaps[0].shape[2:]).requires_grad_()
        eager, ours = (
            module.MultiscaleDiscriminator(*arguments) for module in (reference, spade_fast)
        )
        return network_problem(
            settings,
            name,
            mode,
            eager,
            ours,
            segmaps,
            (images,),
            lambda network, segmap, images: network(
                torch.cat([segmap.repeat(2, 1, 1, 1), images], dim=1)
            ),
            lambda network, segmap, images: network(images, segmap),
            takes_layouts=True,
        )

    yield plan_of(build, settings, name_of(settings, f"COCO {scene_size(settings)}²"), BACKWARD)
