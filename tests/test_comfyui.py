"""The nodes for ComfyUI, called as ComfyUI calls them."""

import importlib.util
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_data import draw_folder
from PIL import Image
from refusals import refusal

from spade_fast import SPADEGenerator, checkpoint
from spade_fast.generation import generate
from spade_fast.settings import Config
from spade_fast.training.run import GENERATOR, SETTINGS

FILE = Path(__file__).parent.parent / "docs/comfyui/spade_fast_nodes.py"
spec = importlib.util.spec_from_file_location("spade_fast_nodes", FILE)
assert spec is not None and spec.loader is not None
nodes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(nodes)
generate_node = nodes.Generate().generate


def image_of(path):
    """A file as ComfyUI's LoadImage gives it: IMAGE, float32 [1, H, W, 3] from 0 to 1."""
    pixels = np.array(Image.open(path).convert("RGB"))
    return torch.from_numpy(pixels.astype(np.float32) / 255)[None]


@pytest.fixture
def files(tmp_path):
    """Label maps, and weights of a generator with edges of instances and a style."""
    draw_folder(tmp_path, 2)
    generator = SPADEGenerator.official(184, crop_size=32, ngf=2, nhidden=2, use_vae=True)
    checkpoint.write(generator, tmp_path / "g.pth")
    return tmp_path


def test_what_comfyui_reads():
    assert nodes.NODE_CLASS_MAPPINGS.keys() == nodes.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        groups = node.INPUT_TYPES()
        given = {name: of for group in groups.values() for name, of in group.items()}
        function = inspect.signature(getattr(node(), node.FUNCTION))
        assert list(given) == list(function.parameters)
        required = [name for name, own in function.parameters.items() if own.default is own.empty]
        assert set(required) <= set(groups["required"])
        kinds = {of[0] for of in given.values() if isinstance(of[0], str)}
        assert kinds <= {"IMAGE", "MASK", "INT", "STRING"}
        assert node.RETURN_TYPES == ("IMAGE",) and node.CATEGORY == "spade_fast"


def test_the_images_are_those_of_generate(files):
    names = ("00000", "00001")
    kinds = {"label": files / "label", "inst": files / "inst"}
    maps = {
        kind: torch.cat([image_of(folder / f"{number:03}.png") for number in range(2)])
        for kind, folder in kinds.items()
    }
    (made,) = generate_node(maps["label"], str(files / "g.pth"), "coco_stuff", 7, maps["inst"])
    assert made.dtype == torch.float32 and made.shape == (2, 32, 32, 3)
    for folder in kinds.values():  # z depends on the name, which a node has not
        for number, name in enumerate(names):
            (folder / f"{number:03}.png").rename(folder / f"{name}.png")
    generate(
        files / "g.pth",
        kinds["label"],
        files / "out",
        instances=kinds["inst"],
        convention="coco_stuff",
        seed=7,
    )
    for one, name in zip(made, names):
        assert torch.equal(one[None], image_of(files / "out" / f"{name}.png"))


def test_colours_and_painted_masks(tmp_path):
    """The same label map, in colours and painted by masks; the palette of a run is a default."""
    weights, palette = str(tmp_path / GENERATOR), tmp_path / "palette.txt"
    checkpoint.write(SPADEGenerator.official(3, crop_size=32, ngf=2, nhidden=2), weights)
    palette.write_text("0 0 0 0\n200 10 30 2\n")
    Config(num_classes=3, palette=str(palette)).save(tmp_path / SETTINGS)
    mask = torch.zeros(1, 20, 24)
    mask[:, 5:, 3:9] = 1
    empty = torch.zeros(1, 20, 24, 3)
    (painted,) = nodes.Paint().paint(empty, mask, 2)
    assert painted[0, 6, 4].tolist() == pytest.approx([2 / 255] * 3) and not painted[0, 0].any()
    coloured = mask[..., None] * torch.tensor([200, 10, 30]) / 255
    (by_colours,) = generate_node(coloured, weights, palette=str(palette))
    (by_numbers,) = generate_node(painted, weights)
    (by_run,) = generate_node(coloured, str(tmp_path))
    assert torch.equal(by_colours, by_numbers) and torch.equal(by_run, by_numbers)
    assert not torch.equal(by_numbers, generate_node(empty, weights)[0])


def test_refusals(tmp_path):
    weights = str(tmp_path / "g.pth")
    checkpoint.write(SPADEGenerator.official(3, crop_size=32, ngf=2, nhidden=2), weights)
    labels = torch.zeros(1, 8, 8, 3)
    blended = refusal(generate_node, labels + 0.001, weights)
    assert "neither blended nor resized by interpolation" in blended
    assert "neither blended" in refusal(generate_node, labels - 1, weights)
    assert "labels has a 7 in 64 pixels" in refusal(generate_node, labels + 7 / 255, weights)
    assert refusal(generate_node, labels, " ").startswith("weights is ' '; it should be a file")
    assert "without a palette" in refusal(generate_node, labels + torch.eye(3)[0], weights)
    assert "style is given and encoder is not" in refusal(
        generate_node, labels, weights, style=labels
    )
    wrong = refusal(nodes.Paint().paint, labels, torch.ones(1, 4, 8), 1)
    assert wrong.startswith("mask has shape [1, 4, 8]; it should be [1, 8, 8]")
