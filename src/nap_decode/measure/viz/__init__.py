"""Pictures of decodes (extra ``viz``: matplotlib).

Every function draws into the axes that it is given, or into new ones, and returns them; nothing is shown or saved.
"""

from nap_decode.measure.viz.animation import CanvasAnimation, animate
from nap_decode.measure.viz.plots import RunningARness, plot_arness, plot_frontier, plot_order, running_arness

__all__ = [
    "CanvasAnimation",
    "RunningARness",
    "animate",
    "plot_arness",
    "plot_frontier",
    "plot_order",
    "running_arness",
]
