"""Nodes of ComfyUI: draw a label map with masks, and make images of label maps with a generator.

Copy this file into the folder custom_nodes of ComfyUI, whose Python needs spade_fast. A label map
is an IMAGE whose grey values, 0 to 255, are labels; with a palette its colours stand for labels.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from spade_fast.data import read_palette
from spade_fast.data.pairs import CONVENTIONS, convention_of
from spade_fast.generation import generate
from spade_fast.training.run import Run

AS_TRAINED = "as trained"  # the convention of a run; for other weights, "folder"


def pixels_of(name: str, image: torch.Tensor) -> np.ndarray:
    """uint8 [N, H, W, 3] of an IMAGE [N, H, W, 3] that has whole numbers of 255ths. Errors:
    ValueError if it has others, which are no labels.
    """
    values = image.cpu().double() * 255
    whole = values.round().clamp(0, 255)
    if not (values - whole).abs().le(1e-2).all():
        raise ValueError(
            f"{name} has values other than 0/255, 1/255, …, 255/255; it should be a label map as"
            " it was saved, neither blended nor resized by interpolation"
        )
    return whole.to(torch.uint8).numpy()


def save_maps(name: str, image: torch.Tensor, folder: Path, ending: str, grey: bool) -> None:
    """Writes each map as a PNG: of numbers, or of colours if `grey` is False or it has some."""
    folder.mkdir(exist_ok=True)
    for number, pixels in enumerate(pixels_of(name, image)):
        if grey and (pixels == pixels[..., :1]).all():
            pixels = pixels[..., 0]
        Image.fromarray(pixels).save(folder / f"{number:05}{ending}.png")


class Paint:
    """Gives the pixels of a mask a label: from an empty image, mask by mask, to a label map."""

    CATEGORY, FUNCTION, RETURN_TYPES = "spade_fast", "paint", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple]]:
        return {
            "required": {
                "label_map": ("IMAGE",),
                "mask": ("MASK",),
                "label": ("INT", {"default": 0, "min": 0, "max": 255}),
            }
        }

    def paint(self, label_map: torch.Tensor, mask: torch.Tensor, label: int) -> tuple[torch.Tensor]:
        """IMAGE [N, H, W, 3], MASK [N or 1, H, W] and a grey value to an IMAGE."""
        if mask.shape[1:] != label_map.shape[1:3] or len(mask) not in (1, len(label_map)):
            raise ValueError(
                f"mask has shape {list(mask.shape)}; it should be {list(label_map.shape[:3])}, as"
                " the label map, or one mask for all"
            )
        return (torch.where(mask[..., None] >= 0.5, label / 255, label_map),)


class Generate:
    """Makes an image of each label map, as `spade-fast generate` does."""

    CATEGORY, FUNCTION, RETURN_TYPES = "spade_fast", "generate", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple]]:
        return {
            "required": {
                "label_map": ("IMAGE",),
                "weights": ("STRING", {"tooltip": "a file of weights, or the folder of a run"}),
                "convention": ([AS_TRAINED, *CONVENTIONS],),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**53 - 1}),
            },
            "optional": {
                "instances": ("IMAGE", {"tooltip": "a grey value for each instance"}),
                "style": ("IMAGE", {"tooltip": "a photograph, for a run with an encoder"}),
                "palette": ("STRING", {"tooltip": "a file with lines R G B CLASS"}),
            },
        }

    def generate(
        self,
        label_map: torch.Tensor,
        weights: str,
        convention: str = AS_TRAINED,
        seed: int = 0,
        instances: torch.Tensor | None = None,
        style: torch.Tensor | None = None,
        palette: str = "",
    ) -> tuple[torch.Tensor]:
        """IMAGE [N, H, W, 3] to IMAGE [N, *the generator's size, 3]. Errors: those of
        spade_fast.generation.generate; ValueError if a label map is wrong.
        """
        if not weights.strip():
            raise ValueError(
                f"weights is {weights!r}; it should be a file of weights, or the folder of a run"
            )
        is_run = Path(weights).is_dir()
        if convention == AS_TRAINED:
            convention = Run(weights).settings().convention if is_run else "folder"
        endings, others = convention_of(convention), dict[str, Any]()
        if palette:
            others["palette"] = read_palette(palette)
        with tempfile.TemporaryDirectory() as name:
            labels, out = Path(name, "label_map"), Path(name, "images")
            has_colours = bool(palette) or (is_run and Run(weights).settings().palette is not None)
            save_maps("label_map", label_map, labels, endings.labels, not has_colours)
            if instances is not None:
                others["instances"] = Path(name, "instances")
                save_maps("instances", instances, others["instances"], endings.instances, True)
            if style is not None:
                others["style"] = Path(name, "style.png")
                photograph = (style[0].cpu() * 255).round().to(torch.uint8).numpy()
                Image.fromarray(photograph).save(others["style"])
            device = "cuda" if torch.cuda.is_available() else "cpu"
            report = generate(
                weights, labels, out, convention=convention, seed=seed, device=device, **others
            )
            if report.faults:
                raise ValueError("\n".join(report.faults))
            made = [np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))]
        return (torch.from_numpy(np.stack(made)).float() / 255,)


NODE_CLASS_MAPPINGS = {"SpadeFastPaint": Paint, "SpadeFastGenerate": Generate}
NODE_DISPLAY_NAME_MAPPINGS = {
    "SpadeFastPaint": "Paint a label (spade_fast)",
    "SpadeFastGenerate": "Label map to image (spade_fast)",
}
