"""`spade-fast paint`: a page to paint a label map on, which shows the generator's image of it.

`app_of` makes the web application for a service and its classes, and `serve` runs it at a socket
from `listening`. The page loads nothing from elsewhere. The server takes numbers and photographs,
but no paths, and writes no files.
"""

from .classes import Class, Classes, classes_of, read_classes
from .demo import demo_classes, train_demo
from .server import app_of, check_installed, listening, serve, server_of

__all__ = [
    "Class",
    "Classes",
    "app_of",
    "check_installed",
    "classes_of",
    "demo_classes",
    "listening",
    "read_classes",
    "serve",
    "server_of",
    "train_demo",
]
