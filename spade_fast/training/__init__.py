"""Training: the published recipe, on one processor, one GPU or many machines.

`train(config)` does the whole job in a folder, and `resume` goes on with it. `Trainer` is the loop
alone: `for step in trainer.fit(batches)`, with networks, losses and optimizers of your own or made
by the settings.
"""

from ..settings import PRESETS, Config, preset
from .recorder import Stopped
from .start import resume, train
from .step import Networks
from .trainer import Step, Trainer

__all__ = [
    "PRESETS",
    "Config",
    "Networks",
    "Step",
    "Stopped",
    "Trainer",
    "preset",
    "resume",
    "train",
]
