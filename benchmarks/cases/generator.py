"""The case `generator`: the published generators."""

import functools

import torch

import spade_fast
from spade_fast import reference

from .networks import COCO_NORM, network_problem
from .problem import BACKWARD, FORWARD, name_of, plan_of
from .scenes import conditions

NO_SPECTRAL_NORM = {"norm_G": COCO_NORM.removeprefix("spectral")}


def generator(settings):
    """The published generators: COCO 256², a small network without spectral norm, four samples of
    one layout, COCO 256² without spectral norm, Cityscapes 512 × 256, and
    num_upsampling_layers="most" at 512².
    """
    ngf, size = (8, 64) if settings.quick else (64, 256)
    small = min(size, 128)
    problems = [
        (f"COCO {size}²", 184, (size, size), {}),
        (f"small {small}²", 36, (small, small), {"ngf": 16, "nhidden": 64} | NO_SPECTRAL_NORM),
        (f"4 samples of one COCO layout, {size}²", 184, (size, size), {"use_vae": True}),
        (f"COCO {size}², no spectral norm", 184, (size, size), NO_SPECTRAL_NORM),
        (
            f"Cityscapes {2 * size} × {size}",
            36,
            (size, 2 * size),
            {"aspect_ratio": 2.0, "num_upsampling_layers": "more"},
        ),
        (f"most {2 * size}²", 184, (2 * size, 2 * size), {"num_upsampling_layers": "most"}),
    ]

    @functools.lru_cache(1)  # shared by both modes
    def inputs(shape, label_nc, draws_z):
        segmaps = list(conditions(settings, shape, label_nc))
        return segmaps, (torch.randn(4 * settings.batch, 256),) if draws_z else ()

    def build(settings, name, mode, label_nc, shape, wiring):
        segmaps, z = inputs(shape, label_nc, "use_vae" in wiring)
        wiring = {"crop_size": shape[1], "ngf": ngf, "nhidden": 128, "norm_G": COCO_NORM} | wiring
        ours = spade_fast.SPADEGenerator.official(label_nc, **wiring)
        block = functools.partial(reference.SPADEResnetBlock, nhidden=wiring.pop("nhidden"))
        torch.manual_seed(0)
        eager = reference.SPADEGenerator(label_nc, block=block, **wiring)
        return network_problem(
            settings,
            name,
            mode,
            eager,
            ours,
            segmaps,
            z,
            lambda network, segmap, *z: network(segmap.repeat(4, 1, 1, 1) if z else segmap, *z),
            lambda network, segmap, *z: network(segmap, *z),
            # Beside z, a network without SPADE reads nothing but the number of images.
            lambda network, segmap, *z: network(z[0] if z else segmap, *z),
            bare=("floor", "limit"),
            takes_layouts=True,
            graphed=settings.device != "cpu",
        )

    for name, *problem in problems[: 3 if settings.quick else None]:
        for mode in (FORWARD, BACKWARD):
            yield plan_of(build, settings, name_of(settings, name), mode, *problem)
