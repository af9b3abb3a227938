"""Options that several commands have, each with one meaning."""

from pathlib import Path
from typing import Annotated

import typer

WORDS = "folder, coco_stuff, ade20k or cityscapes."
Convention = Annotated[str, typer.Option(help=WORDS)]
Palette = Annotated[
    Path | None, typer.Option(help="For colour-coded maps: a line R G B CLASS per colour.")
]
NumClasses = Annotated[int | None, typer.Option(min=1, help='Without "don\'t care".')]
DontCare = Annotated[int | None, typer.Option(help="The number in the maps that is no class.")]
Device = Annotated[str, typer.Option(help="Such as cpu or cuda.")]
