"""Runs code in a fresh interpreter."""

import os
import subprocess
import sys


def python(code, **environment):
    """Runs code in a fresh Python. Returns its stdout and stderr."""
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True
    )
    return run.stdout, run.stderr
