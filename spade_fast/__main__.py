"""`python -m spade_fast` is `spade-fast`: what launchers of several processes call."""

from .cli import app

app(prog_name="spade-fast")
