"""The steps of training, against the plain PyTorch trainer of the published recipe."""

import itertools
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn as nn
from agree import ADAM, assert_agree, assert_layers_agree

from spade_fast import SemanticLayout, losses, reference
from spade_fast.data import Batch
from spade_fast.training import Config, Trainer
from spade_fast.training.networks import make_networks

CLASSES, EDGES, CROP, Z_DIM = 5, 1, 64, 6
LABEL_NC = CLASSES + EDGES
STEPS = 3


def batches(count=STEPS, images=2, dtype=torch.float64):
    """Layouts of blocks, and images of noise."""
    random = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        labels = torch.randint(CLASSES, (images, 8, 8), generator=random)
        labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)
        layout = SemanticLayout.from_labels(labels, CLASSES, labels)
        photographs = torch.rand(images, 3, CROP, CROP, generator=random, dtype=dtype) * 2 - 1
        found.append(Batch(layout, photographs, ("",) * images))
    return found


def numbers(batch, count=2 * STEPS):
    """The noise of several steps."""
    random = torch.Generator().manual_seed(1)
    return [
        torch.randn(len(batch.images), Z_DIM, generator=random, dtype=torch.float64)
        for _ in range(count)
    ]


def settings(**others):
    small = dict(
        num_classes=CLASSES,
        instances="somewhere",
        crop_size=CROP,
        ngf=2,
        ndf=4,
        z_dim=Z_DIM,
        init_gain=1.0,
        perceptual=False,
        batch=2,
        steps=STEPS,
    )
    return Config(**small | others)


def features():
    """A perceptual loss with random weights in VGG19's shapes."""
    random = torch.Generator().manual_seed(2)
    with torch.device("meta"):
        shapes = losses.perceptual._layers()
        weights = nn.Sequential(*shapes).state_dict()
    weights = {
        f"features.{name}": torch.randn(tensor.shape, generator=random)
        * (2 / max(1, tensor[0].numel())) ** 0.5
        for name, tensor in weights.items()
    }
    return losses.Perceptual(weights)


def plain(networks, config):
    """The plain trainer with copies of the networks' weights."""
    generator = reference.SPADEGenerator(
        LABEL_NC,
        ngf=2,
        crop_size=CROP,
        use_vae=config.use_vae,
        z_dim=Z_DIM,
        norm_G=config.norm_G,
    )
    discriminator = reference.MultiscaleDiscriminator(LABEL_NC + 3, ndf=4)
    encoder = reference.ConvEncoder(4, Z_DIM) if config.use_vae else None
    for ours, theirs in (
        (networks.generator, generator),
        (networks.discriminator, discriminator),
        (networks.encoder, encoder),
    ):
        if ours is not None:
            theirs.double().load_state_dict(ours.state_dict())
    return reference.PublishedTrainer(
        generator,
        discriminator,
        encoder,
        networks.perceptual,
        config.lr_generator,
        config.lr_discriminator,
    )


@pytest.mark.parametrize("vgg", [False, True], ids=["", "vgg"])
@pytest.mark.parametrize("use_vae", [False, True], ids=["", "vae"])
def test_three_steps_equal_the_plain_trainers(use_vae, vgg):
    config = settings(use_vae=use_vae)
    networks = double(make_networks(config, LABEL_NC))
    networks.perceptual = features().double() if vgg else None
    given = batches()
    noise = itertools.cycle(numbers(given[0]))
    trainer = Trainer(config, networks, noise=lambda like: next(noise))
    truth = plain(networks, config)
    theirs = itertools.cycle(numbers(given[0])) if use_vae else None
    weights = dict(adversarial=1, feature_matching=10, perceptual=10, kl=0.05, fake=1, real=1)
    for step, batch in zip(trainer.fit(given), given):
        expected = truth.step(batch.layout.to_segmap(torch.float64), batch.images, theirs)
        assert set(step.losses) == set(expected)
        for name, loss in step.losses.items():
            assert_agree(loss, weights[name] * expected[name], ADAM, name=name)
        for kind in ("generator", "discriminator", "encoder"):
            own, other = getattr(networks, kind), getattr(truth, kind)
            if own is None:
                continue
            gradients = [
                {name: parameter.grad for name, parameter in network.named_parameters()}
                for network in (own, other)
            ]
            assert_layers_agree(*gradients, ADAM)
            assert_layers_agree(own.state_dict(), other.state_dict(), ADAM)
    assert trainer.number == STEPS


def double(networks):
    for network in networks.trained().values():
        network.double()
    return networks


@pytest.mark.parametrize(
    "use_vae", [False, pytest.param(True, marks=pytest.mark.full)], ids=["", "vae"]
)
def test_two_processes_equal_one_with_the_whole_batch(use_vae, tmp_path):
    """Losses, gradients, weights and running statistics, with syncbatch norm and exchanged
    gradients.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_of_two, (use_vae, tmp_path, port), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    whole = three_steps(use_vae, slice(None))
    for name in whole:
        assert_layers_agree(first[name], whole[name], ADAM)
        assert_layers_agree(second[name], whole[name], ADAM)


def one_of_two(rank, use_vae, folder, port):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.save(three_steps(use_vae, slice(rank, rank + 1)), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def three_steps(use_vae, images):
    """The losses of three steps, and the gradients and states afterwards."""
    config = settings(use_vae=use_vae)
    trainer = Trainer(config, double(make_networks(config, LABEL_NC)))
    given = [
        Batch(batch.layout[images], batch.images[images], batch.names[images])
        for batch in batches()
    ]
    found = {
        f"losses {step.number}": {
            name: torch.tensor(loss, dtype=torch.float64)
            for name, loss in trainer.mean(step.losses).items()
        }
        for step in trainer.fit(given)
    }
    for name, network in trainer.networks.trained().items():
        found[name] = dict(network.state_dict())
        found[f"{name}'s gradients"] = {
            key: parameter.grad for key, parameter in network.named_parameters()
        }
    return found
