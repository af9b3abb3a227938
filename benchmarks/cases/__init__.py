"""The cases to measure: the modulation, the residual blocks, the generator and others, each beside
its rivals, its floor and its limit.

A case yields plans, which have names and build their problem only when they are called. A problem
has variants, which are functions that each compute the same results once and return them by name,
and a truth in float64. The floor is the same network with plain instance norm in place of every
SPADE. The limit is the same network with nothing in place of them, so that its convolutions and
activations remain: what a user has to pay for anyway.

problem.py defines these words. scenes.py and networks.py have what several cases share. Every other
module is a case and what it needs; modulation.py is two cases.
"""

from . import (
    block,
    converted,
    discriminator,
    export,
    generate,
    generator,
    layer,
    modulation,
    monai,
    paint,
    spatial,
    training,
)

CASES = {
    "modulate": modulation.modulate,
    "lookup": modulation.lookup,
    "layer": layer.layer,
    "block": block.block,
    "generator": generator.generator,
    "generate": generate.generate,
    "paint": paint.paint,
    "discriminator": discriminator.discriminator,
    "training": training.training,
    "converted": converted.converted,
    "monai": monai.monai,
    "spatial": spatial.spatial,
    "export": export.export,
}
