"""Makes `python -m spade_fast` run `spade-fast`, for launchers that start several processes."""

from .cli import app

app(prog_name="spade-fast")
