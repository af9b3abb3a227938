"""The scenes that cases measure on: conditions and label maps, drawn or read from a folder."""

import numpy as np
import torch

from .. import layouts


def scene_size(settings):
    """Default height and width of `conditions`."""
    return 64 if settings.quick else 256


def conditions(settings, size=(256, 256), label_nc=184):
    """Yields conditions [batch, label_nc, *size], or at 64² with --quick, of the first scenes of
    `settings.labels`, or of drawn scenes if it is None. If the folder has too few, the same scenes
    follow mirrored. For fewer classes than COCO-Stuff's, several classes share a number.
    """
    classes, batch = label_nc - 2, []
    for labels, instances in label_maps(settings, (64, 64) if settings.quick else size):
        batch.append(
            layouts.condition(np.where(labels == 255, 255, labels % classes), instances, classes)
        )
        if len(batch) == settings.batch:
            yield torch.cat(batch)
            batch = []


def label_maps(settings, size):
    """Yields the label maps and instance maps of `conditions`."""
    count = settings.scenes * settings.batch
    if settings.labels is None:
        scenes = map(layouts.draw_scene, range(count))
    else:
        scenes = layouts.load_scenes(settings.labels, settings.instances)
        scenes = [*scenes, *map(layouts.mirrored, scenes)][:count]
    for labels, instances in scenes:
        instances = np.zeros_like(labels) if instances is None else instances
        yield layouts.resized(labels, instances, size)
