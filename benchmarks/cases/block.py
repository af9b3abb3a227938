"""The case `block`: the residual blocks of the published COCO generator."""

import functools

import torch

import spade_fast
from spade_fast import reference

from .networks import COCO_NORM, network_problem
from .problem import BACKWARD, FORWARD, name_of, plan_of
from .scenes import conditions

# (fin, fout, size) of the COCO generator's blocks.
COCO_BLOCKS = [
    (1024, 1024, 8),
    (1024, 1024, 16),
    (1024, 512, 32),
    (512, 256, 64),
    (256, 128, 128),
    (128, 64, 256),
]


def block(settings):
    """The residual blocks of the published COCO generator, on a COCO-Stuff layout at 256²."""

    @functools.cache
    def segmaps():
        return list(conditions(settings))

    def build(settings, name, mode, fin, fout, size):
        # With seed 0, in the quick problem, a leaky ReLU's sign differs in torch.compile.
        torch.manual_seed(1)
        networks = [
            kind(fin, fout, COCO_NORM, 184)
            for kind in (reference.SPADEResnetBlock, spade_fast.SPADEResnetBlock)
        ]
        x = torch.randn(settings.batch, fin, size, size).requires_grad_(mode == BACKWARD)
        return network_problem(
            settings,
            name,
            mode,
            *networks,
            segmaps(),
            (x,),
            lambda network, segmap, x: network(x, segmap),
            bare=("floor", "limit"),
            takes_layouts=True,
        )

    for fin, fout, size in [(128, 64, 64)] if settings.quick else COCO_BLOCKS:
        for mode in (FORWARD, BACKWARD):
            name = name_of(settings, f"{fin} → {fout} at {size}²")
            yield plan_of(build, settings, name, mode, fin, fout, size)
