"""Path-X: Pathfinder on images of 128 x 128 pixels, 16,384 tokens, two classes.

The same question as in Pathfinder, with curves that go further (Tay et al. 2021, arXiv 2011.04006).
"""

from lra.tasks import register_task
from lra.tasks.pathfinder import Pathfinder


@register_task("pathx")
class PathX(Pathfinder):
    """Pathfinder images of 128 x 128 pixels: generated, or those of the release."""

    name = "pathx"
    title = "Path-X"
    window = 128
    piece = 1_024
    part = 256
    step = 32
