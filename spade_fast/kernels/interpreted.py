"""Whether the Triton kernels run on a CPU in Triton's interpreter, which is for tests."""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
