import torch

from ..losses import halves


def judge(discriminator, fakes, reals, layout):
    return halves(discriminator(torch.cat([fakes, reals]), layout))
