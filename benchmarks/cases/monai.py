"""The case `monai`: MONAI's models, before and after `spade_fast.convert`."""

import dataclasses
import functools

import torch
import torch.nn as nn

from spade_fast import SemanticLayout

from .. import layouts
from .networks import converted_problem, with_converted
from .problem import BACKWARD, FORWARD, name_of, plan_of


def monai(settings):
    """MONAI's models, before and after `spade_fast.convert`: its generator of volumes, and its
    diffusion UNet over 50 steps.
    """
    settings = dataclasses.replace(settings, batch=1)  # one volume or image at a time

    @functools.cache  # shared by both modes
    def volumes(size, channels):
        nets, _ = nets_and_schedulers()
        torch.manual_seed(0)
        drawn = [
            SemanticLayout.from_labels(layouts.draw_volume(number, size)[None], 8).to_segmap()
            for number in range(settings.scenes)
        ]
        network = nets.SPADENet(3, 1, 1, 8, [size] * 3, list(channels), 16, False)
        return with_converted(network), drawn

    def build_generator(settings, name, mode, size, channels):
        inputs = (torch.randn(1, 16),)
        return converted_problem(settings, name, mode, *volumes(size, channels), inputs)

    def build_diffusion(settings, name, mode, size, channels, steps):
        nets, schedulers = nets_and_schedulers()
        scheduler = schedulers.DDIMScheduler(num_train_timesteps=1000)
        scheduler.set_timesteps(steps)

        def sample(model, segmap, image):
            for step in scheduler.timesteps.to(image.device):
                image, _ = scheduler.step(model(image, step[None], segmap), step, image)
            return image

        labels = [
            torch.as_tensor(layouts.resized(*layouts.draw_scene(number), (size, size))[0])
            for number in range(settings.scenes)
        ]
        segmaps = [
            SemanticLayout.from_labels(label[None].long() % 8, 8).to_segmap() for label in labels
        ]
        torch.manual_seed(0)
        network = nets.SPADEDiffusionModelUNet(
            2,
            3,
            3,
            8,
            (2,) * len(channels),
            channels,
            (*[False] * (len(channels) - 1), True),
            norm_num_groups=8,
            num_head_channels=channels[-1] // 4,
        )
        for parameter in network.parameters():
            if not parameter.any():  # MONAI initialises its last convolutions with zeros
                nn.init.normal_(parameter, std=0.01)
        image = torch.randn(1, 3, size, size)
        return converted_problem(
            settings,
            name,
            mode,
            with_converted(network),
            segmaps,
            (image,),
            sample,
            keeps_tables=True,
        )

    size, channels = (32, (8, 16)) if settings.quick else (96, (16, 32, 64))
    for mode in (FORWARD, BACKWARD):
        name = name_of(settings, f"SPADENet {size}³")
        yield plan_of(build_generator, settings, name, mode, size, channels)
    size, channels, steps = (16, (8, 16), 2) if settings.quick else (64, (64, 128, 256), 50)
    name = name_of(settings, f"diffusion UNet {size}², {steps} steps")
    yield plan_of(build_diffusion, settings, name, FORWARD, size, channels, steps)


def nets_and_schedulers():
    """MONAI's modules `nets` and `schedulers`."""
    try:
        from monai.networks import nets, schedulers
    except ImportError as error:
        raise ModuleNotFoundError(
            f"the case monai needs MONAI and einops: pip install monai einops ({error})"
        ) from error
    return nets, schedulers
