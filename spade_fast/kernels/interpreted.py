"""Whether Triton's kernels run in its interpreter, on a CPU: that is for tests."""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
