"""A run of a few seconds learns to paint drawn scenes."""

import re

import pytest
import torch
from drawn_data import draw_folder, settings_for

from spade_fast import checkpoint
from spade_fast.training import Config, train
from spade_fast.training.examples import folder_of

FALLS = 1.5  # feature matching in the run's first tenth over its last; 2.2 was seen
# an image's distance from other scenes' photographs over that from its own; 2.6 was seen
APART = 1.4


@pytest.mark.full
def test_it_learns(tmp_path):
    others = dict(
        crop_size=64,
        preprocess="fixed",
        flip=False,
        norm_G="spectralspadeinstance3x3",
        ngf=4,
        ndf=8,
        nhidden=8,
        init_gain=1.0,
        lr_generator=2e-3,
        lr_discriminator=2e-4,
        weight_adversarial=0.1,
        ema=0.9,
        steps=150,
        log_every=15,
    )
    folder = draw_folder(tmp_path / "scenes")
    config = Config(**settings_for(folder, out=str(tmp_path / "run")) | others)
    generator = checkpoint.load(train(config))
    lines = (tmp_path / "run" / "log.txt").read_text()
    matching = [float(found) for found in re.findall(r"feature_matching (\S+)", lines)]
    assert len(matching) == 10 and matching[0] > FALLS * matching[-1]

    examples = list(folder_of(config.changed(num_classes=182, dont_care=255)))
    photographs = torch.cat([example.image for example in examples])
    with torch.no_grad():
        images = torch.cat([generator(example.layout) for example in examples])
    distances = (images[:, None] - photographs).abs().mean(dim=(2, 3, 4))
    own = distances.diagonal().clone()
    distances.fill_diagonal_(torch.inf)
    assert (distances.amin(dim=1) > APART * own).all(), distances
