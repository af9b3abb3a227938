"""Training: the published recipe, on a CPU, one GPU or many machines.

`train(config)` does a whole run in a folder, and `resume` continues it. `Trainer` is the loop
alone: `for step in trainer.fit(batches)`, with networks and optimizers of your own or those that
the settings describe.
"""

from .config import PRESETS, Config, preset
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
