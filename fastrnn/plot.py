"""Pictures, with matplotlib (the extra ``plot``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def alignment(weights: Tensor, source: Sequence[str], target: Sequence[str], *, ax: Axes | None = None) -> Axes:
    """Draws which source tokens each target token looked at, the weights being colours from 0 to 1.

    Args:
        weights: [len(target), len(source)], of any dtype, on any device: for one sentence what an attention module of
            ``fastrnn.nn`` returns.
        source: tokens of the columns. The characters of a string are tokens too.
        target: tokens of the rows.
        ax: where to draw; by default in a new figure of ``matplotlib.pyplot``.

    Returns:
        The axes, whose figure has a colour bar.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: the weights are no tensor, or not of that shape.
    """
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a torch.Tensor, got {type(weights).__name__}")
    if tuple(weights.shape) != (len(target), len(source)):
        raise ValueError(
            f"weights must have shape {(len(target), len(source))}, (target, source), got {tuple(weights.shape)}"
        )
    if ax is None:
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError("fastrnn.plot needs matplotlib: pip install fastrnn[plot]") from error
        size = 1.5 + 0.35 * len(source), 1 + 0.35 * len(target)
        _, ax = pyplot.subplots(figsize=size, layout="constrained")
    image = ax.imshow(weights.detach().to("cpu", torch.float32).numpy(), cmap="gray", vmin=0, vmax=1, aspect="auto")
    # A token such as $x$ is no formula.
    ax.set_xticks(range(len(source)), labels=list(source), rotation=90, parse_math=False)
    ax.set_yticks(range(len(target)), labels=list(target), parse_math=False)
    ax.xaxis.tick_top()
    ax.figure.colorbar(image, ax=ax)
    return ax
