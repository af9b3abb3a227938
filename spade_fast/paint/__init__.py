"""`spade-fast paint`: a page on which one paints a label map, and the generator's image follows.

`app_of` makes the application of a service and classes, `serve` runs it. The page is hand-written
and loads nothing from elsewhere; the server takes numbers alone, no files and no paths.
"""

from .classes import Class, Classes, classes_of, read_classes
from .demo import demo_classes, train_demo
from .server import app_of, serve

__all__ = [
    "Class",
    "Classes",
    "app_of",
    "classes_of",
    "demo_classes",
    "read_classes",
    "serve",
    "train_demo",
]
