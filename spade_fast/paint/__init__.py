"""`spade-fast paint`: a page on which one paints a label map, and the generator's image follows.

`app_of` makes the application of a service and classes, `serve` runs it at a socket that is
`listening`. The page is hand-written and loads nothing from elsewhere; the server takes numbers and
photographs, no paths, and writes no files.
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
