"""A fresh interpreter."""

import os
import subprocess
import sys


def python(code, **environment):
    """What a fresh Python prints, and what it says when it fails."""
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True
    )
    return run.stdout, run.stderr
