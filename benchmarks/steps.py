"""A step of training, the published one and ours, from the same state each time."""

import copy
import sys

from spade_fast import SemanticLayout
from spade_fast.data import Batch
from spade_fast.training import Config, Networks, Trainer

# As a fraction of a network's largest gradient in float64. Gradients that are zero in exact
# arithmetic were at 1e-15, the others at 1e-3.
ROUNDING = 1e-11


class OurTrainer:
    """`spade_fast.training.Trainer`, as `training_problem` in cases/training.py calls it: the
    published recipe and, in addition, the generator's running average, which the published trainer
    lacks.
    """

    def __init__(self, generator, discriminator, perceptual=None):
        self.config = Config(num_classes=1, steps=sys.maxsize, perceptual=perceptual is not None)
        networks = Networks(generator, discriminator, None, perceptual)
        self.trainer = Trainer(self.config, networks)
        self.generator, self.discriminator = generator, discriminator
        self.optimizer_g, self.optimizer_d = (one.optimizer for one in self.trainer.optimizers)

    def step(self, condition, image):
        """Returns the losses by name, without their weights. The parameters keep their gradients.

        condition: a SemanticLayout, or a tensor whose layout is found here.
        """
        layout = condition
        if not isinstance(condition, SemanticLayout):
            layout = SemanticLayout.from_segmap(condition)
        losses = self.trainer.step([Batch(layout, image, ("",) * len(image))]).losses
        return {
            name: loss / getattr(self.config, f"weight_{name}", 1) for name, loss in losses.items()
        }


def beginning(trainer):
    """Copies of the weights and buffers of a trainer's networks, for `rewind`."""
    return {
        name: copy.deepcopy(network.state_dict()) for name, network in _networks(trainer).items()
    }


def rewind(trainer, begin):
    """Resets a trainer: weights and buffers as in `begin`, Adam's state zero, no gradients."""
    for name, network in _networks(trainer).items():
        network.load_state_dict(begin[name])
        network.zero_grad()
    for optimizer in (trainer.optimizer_g, trainer.optimizer_d):
        for state in optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
    return trainer


def gradients(trainer):
    """The gradients of all weights by name."""
    return {
        f"d{name}.{key}": parameter.grad
        for name, network in _networks(trainer).items()
        for key, parameter in network.named_parameters()
    }


def weights(trainer):
    """All weights and buffers by name, except weights whose gradient is zero in exact arithmetic,
    such as biases before a norm: Adam scales their rounding errors up to whole steps.
    """
    found = {}
    for name, network in _networks(trainer).items():
        largest = {key: value.grad.abs().max() for key, value in network.named_parameters()}
        least = ROUNDING * max(largest.values())
        for key, tensor in network.state_dict().items():
            if largest.get(key, least) >= least:
                found[f"{name}.{key}"] = tensor
    return found


def _networks(trainer):
    return {"generator": trainer.generator, "discriminator": trainer.discriminator}
