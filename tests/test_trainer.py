"""Trainer as a library: the user's own loop, networks, optimizers and data."""

import itertools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from drawn_data import draw_folder
from exactly import assert_same

from spade_fast.data import Preparation, Stream, loader, read_labels, read_photograph
from spade_fast.training import Config, Networks, Trainer

CLASSES, DONT_CARE, CROP = 182, 255, 32


def config(**others):
    small = dict(num_classes=CLASSES, dont_care=DONT_CARE, instances="given", crop_size=CROP)
    small |= dict(ngf=2, ndf=4, nhidden=4, perceptual=False, batch=2, steps=4)
    return Config(**small | others)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A list of dictionaries, like a Hugging Face data set."""
    folder = draw_folder(tmp_path_factory.mktemp("scenes"))
    return [
        {
            "label": read_labels(folder / "label" / f"{number:03}.png"),
            "inst": read_labels(folder / "inst" / f"{number:03}.png"),
            "image": read_photograph(folder / "img" / f"{number:03}.png"),
        }
        for number in range(4)
    ]


class Tuples:
    """Any iterable can train: of (labels, photograph) or (labels, photograph, instances)."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        for row in self.rows:
            yield row["label"], row["image"], row["inst"]


def batches(scenes, trainer=None, **others):
    preparation = Preparation(CLASSES, DONT_CARE, crop_size=CROP)
    return loader(Stream(Tuples(scenes), preparation), 2, **others)


def state_after(trainer, given):
    for _ in trainer.fit(given):
        pass
    return trainer.state_dict()


@pytest.mark.parametrize("workers", [0, 1])
def test_any_iterable_trains(scenes, workers):
    trainer = Trainer(config())
    generator = trainer.networks.generator
    numbered = dict(sizes=generator.sizes, kernel_size=generator.kernel_size, scales=2)
    losses = []
    for step in trainer.fit(batches(scenes, workers=workers, **numbered)):
        losses.append(trainer.mean(step.losses))
        assert step.generated.shape == (2, 3, CROP, CROP) and step.batch.names[0].isdigit()
    assert trainer.number == len(losses) == 4 and set(losses[0]) >= {
        "feature_matching",
        "fake",
        "real",
    }


class Painter(nn.Module):
    """A user's own generator, without sizes or kernel_size."""

    def __init__(self, channels):
        super().__init__()
        self.paint = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, layout):
        return self.paint(layout.to_segmap()).tanh()


class Critic(nn.Module):
    """A discriminator from outside this package."""

    def __init__(self, channels):
        super().__init__()
        self.first, self.last = nn.Conv2d(channels, 4, 4, 2), nn.Conv2d(4, 1, 4, 2)

    def forward(self, images, layout):
        seen = layout.to_segmap().repeat(len(images) // len(layout), 1, 1, 1)
        features = F.leaky_relu(self.first(torch.cat([seen, images], dim=1)), 0.2)
        return [[features, self.last(features)]]


def own_networks():
    torch.manual_seed(0)
    return Networks(Painter(CLASSES + 2), Critic(CLASSES + 2 + 3))


def test_the_users_own_networks_and_optimizers(scenes):
    """The first step of SGD is the learning rate times the gradient."""
    networks = own_networks()
    before = {name: value.clone() for name, value in networks.generator.named_parameters()}
    rates = 0.25, 0.5
    optimizers = tuple(
        torch.optim.SGD(network.parameters(), rate)
        for network, rate in zip((networks.generator, networks.discriminator), rates)
    )
    trainer = Trainer(config(), networks, optimizers)
    next(trainer.fit(batches(scenes)))
    assert trainer.networks.generator is networks.generator
    for name, value in networks.generator.named_parameters():
        assert torch.equal(value, before[name] - rates[0] * value.grad) and value.grad.any()


def test_changes_between_steps(scenes):
    """Changed learning rates persist, frozen parameters do not move, and the loop can stop and
    continue at any time.
    """
    trainer = Trainer(config())
    given = iter(batches(scenes))
    frozen = trainer.networks.generator.fc.weight.requires_grad_(False)
    held = frozen.clone()
    for step in trainer.fit(given):
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = 0.0
        moved = [value.detach().clone() for value in trainer.networks.generator.parameters()]
        if step.number == 2:
            break
    with pytest.raises(RuntimeError, match="mine"):
        for _ in trainer.fit(given):
            raise RuntimeError("mine")
    assert [step.number for step in trainer.fit(given)] == [4]
    assert torch.equal(frozen, held) and trainer.optimizers[0].param_groups[0]["lr"] == 0
    for value, expected in zip(trainer.networks.generator.parameters(), moved):
        assert torch.equal(value, expected)
    assert list(trainer.fit(given)) == []


@pytest.mark.parametrize("own", [False, True], ids=["made", "own"])
@pytest.mark.parametrize("decay", [0.0, 0.75])
def test_a_state_is_loaded_into_a_new_trainer(scenes, tmp_path, own, decay):
    settings = config(decay=decay)

    def trainer():
        return Trainer(settings, own_networks() if own else None)

    whole = state_after(trainer(), batches(scenes))
    first = trainer()
    for _ in itertools.islice(first.fit(batches(scenes)), 2):
        pass
    torch.save({"mine": "of a user", "trainer": first.state_dict()}, tmp_path / "state.pt")
    second = trainer()
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True)["trainer"])
    assert second.number == 2
    assert_same(state_after(second, batches(scenes, start=2)), whole)


def test_a_state_of_other_networks_is_refused():
    state = Trainer(config()).state_dict()
    with pytest.raises(ValueError, match="another generator than this: size mismatch for"):
        Trainer(config(ngf=4)).load_state_dict(state)
    with pytest.raises(
        ValueError, match="networks generator, discriminator; it should have .* encoder"
    ):
        Trainer(config(use_vae=True)).load_state_dict(state)


def test_arguments_that_a_trainer_refuses():
    with pytest.raises(ValueError, match="steps is not given"):
        Trainer(config(steps=None))
    with pytest.raises(ValueError, match="it should be a SPADEGenerator because recompute"):
        Trainer(config(recompute=True), own_networks())


def test_channels_of_a_users_own_condition(scenes):
    trainer = Trainer(config(instances=None, num_classes=None), label_nc=CLASSES + 2)
    assert [step.number for step in trainer.fit(batches(scenes))] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="num_classes is not given"):
        Trainer(config(num_classes=None))
