"""A step of training, the published one and ours, from the same beginning each time."""

import copy

import torch

from spade_fast import losses

# Of a network's largest gradient in float64: 1e-15 was seen of zeros, 1e-3 of the others.
ROUNDING = 1e-11


class OurTrainer:
    """The step of `reference.PublishedTrainer` with networks and losses of this package. The
    generator's step needs no gradients of the discriminator's weights, and finds none.

    `training_problem` in cases.py needs of a trainer what this one has in public.
    """

    def __init__(self, generator, discriminator, perceptual=None):
        self.generator, self.discriminator = generator.train(), discriminator.train()
        self.perceptual = perceptual
        self.optimizer_g = torch.optim.Adam(generator.parameters(), 1e-4, (0.0, 0.9))
        self.optimizer_d = torch.optim.Adam(discriminator.parameters(), 4e-4, (0.0, 0.9))

    def step(self, condition, image):
        """The losses by name, without their weights; the gradients stay where they are."""
        self.discriminator.requires_grad_(False)
        fake = self.generator(condition)
        fakes, reals = self._judge(condition, fake, image)
        found = {
            "adversarial": losses.for_generator(fakes),
            "feature_matching": losses.feature_matching(fakes, reals),
        }
        total = found["adversarial"] + 10 * found["feature_matching"]
        if self.perceptual is not None:
            found["perceptual"] = self.perceptual(fake, image)
            total = total + 10 * found["perceptual"]
        self.optimizer_g.zero_grad()
        total.backward()
        self.optimizer_g.step()
        self.discriminator.requires_grad_(True)
        del fake, fakes, reals, total  # and the graph, before the next one is made
        found = {name: loss.detach() for name, loss in found.items()}

        with torch.no_grad():
            fake = self.generator(condition)
        fakes, reals = self._judge(condition, fake, image)
        found["fake"], found["real"] = losses.for_discriminator(fakes, reals)
        self.optimizer_d.zero_grad()
        (found["fake"] + found["real"]).backward()
        self.optimizer_d.step()
        return {name: loss.detach() for name, loss in found.items()}

    def _judge(self, condition, fake, real):
        return losses.halves(self.discriminator(torch.cat([fake, real]), condition))


def beginning(trainer):
    """Weights and buffers of a trainer's networks, to `rewind` to."""
    return {
        name: copy.deepcopy(network.state_dict()) for name, network in _networks(trainer).items()
    }


def rewind(trainer, begin):
    """A trainer as it was made: weights and buffers as in the beginning, Adam without a memory, no
    gradients.
    """
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
    """All weights and buffers by name, but for those whose gradient is zero in exact arithmetic,
    such as biases before a norm: Adam divides what rounding left of it by about itself.
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
