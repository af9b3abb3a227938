"""The case `training`: a step of the published training."""

import copy
import functools

import torch

import spade_fast
from spade_fast import SemanticLayout, losses, reference

from .. import steps
from .networks import COCO_NORM, settle
from .problem import BACKWARD, Problem, jitter, name_of, plan_of
from .scenes import conditions, scene_size


def training(settings):
    """A step of the published training of generator and discriminator, on a COCO layout at 256²,
    with hinge and feature matching losses, without and with the perceptual loss.

    VGG19's weights are random, with a fixed seed: this is enough to measure time and agreement.
    """
    if settings.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype is {settings.dtype}, training should have float32 or float64")
    name = f"COCO {scene_size(settings)}²"
    problems = {f"{name}, without VGG19": False, f"{name}, VGG19": True}
    for name, perceptual in list(problems.items())[: 1 if settings.quick else None]:
        yield plan_of(training_problem, settings, name_of(settings, name), BACKWARD, perceptual)


def training_problem(settings, name, mode, perceptual):
    """A step of training, from the same weights each time. In the settings' dtype, losses and
    gradients are compared. In float64, weights and buffers after the step are compared, too. In
    float32 they cannot be: rounding decides the sign of gradients near zero, and Adam turns that
    sign into a whole step.
    """
    segmaps, ngf = list(conditions(settings)), 8 if settings.quick else 64
    size = tuple(segmaps[0].shape[2:])
    torch.manual_seed(0)
    images = [torch.rand(settings.batch, 3, *size) * 2 - 1 for _ in segmaps]
    wiring = {"crop_size": size[1], "norm_G": COCO_NORM}
    published = [
        settle(reference.SPADEGenerator(184, ngf, **wiring)),
        settle(reference.MultiscaleDiscriminator(187, 2, ngf)),
        reference.Perceptual() if perceptual else None,
    ]
    ours = [
        spade_fast.SPADEGenerator.official(184, ngf=ngf, **wiring),
        spade_fast.MultiscaleDiscriminator(187, 2, ngf),
        losses.Perceptual(published[2].state_dict()) if perceptual else None,
    ]
    begin = steps.beginning(reference.PublishedTrainer(*published[:2]))
    for network, weights in zip(ours, begin.values()):
        network.load_state_dict(weights)

    def trainer_of(parts, dtype):
        generator, discriminator, perceptual = (
            None if part is None else copy.deepcopy(part).to(settings.device, dtype)
            for part in parts
        )
        if parts is ours:
            return steps.OurTrainer(generator, discriminator, perceptual)
        return reference.PublishedTrainer(generator, discriminator, perceptual=perceptual)

    def step(trainer, condition, image):
        return trainer.step(condition, image) | steps.gradients(trainer)

    def in_double(parts):
        trainer = trainer_of(parts, torch.float64)
        inputs = (tensors[problem.scene] for tensors in (segmaps, images))
        found = step(trainer, *(tensor.to(settings.device, torch.float64) for tensor in inputs))
        return found | steps.weights(trainer)

    def jittered(number):
        # Alternately in channels-last, where PyTorch's convolutions round five times as much.
        trainer = steps.rewind(trainers["eager"], begin)
        networks = (trainer.generator, trainer.discriminator)
        if number % 2:
            for network in networks:
                network.to(memory_format=torch.channels_last)
        found = step(trainer, *(jitter(tensors[problem.scene]) for tensors in inputs))
        for network in networks:
            network.to(memory_format=torch.contiguous_format)
        return found

    @functools.cache
    def layout_of_scene(number):
        return SemanticLayout.from_segmap(inputs[0][number])

    inputs = [
        [tensor.to(settings.device, settings.dtype) for tensor in tensors]
        for tensors in (segmaps, images)
    ]
    eager, own = (trainer_of(parts, settings.dtype) for parts in (published, ours))
    if settings.device != "cpu":
        for network in (own.generator, own.discriminator):
            network.to(memory_format=torch.channels_last)
    # Each view is a new tensor, so finding its windows is part of the step.
    conditions_of = {
        "eager": lambda number: inputs[0][number],
        "spade_fast": lambda number: inputs[0][number].view_as(inputs[0][number]),
        "spade_fast, prepared": layout_of_scene,
    }
    trainers = {name: eager if name == "eager" else own for name in conditions_of}

    def variant(name):
        return lambda: step(
            trainers[name], conditions_of[name](problem.scene), inputs[1][problem.scene]
        )

    problem = Problem(
        name,
        mode,
        settings.wanted({name: functools.partial(variant, name) for name in conditions_of}),
        lambda: in_double(published),
        jittered,
        lambda: in_double(ours),
        scenes=segmaps,
        prepare=lambda name: steps.rewind(trainers[name], begin),
    )
    return problem
