"""What all figures have in common; a part of `plot`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go

GREY = "#95a5a6"


def step(n: int) -> int:
    """Between labels of n neighbours: all where they are few."""
    return next(step for step in (1, 2, 4, 8, 16, 32, n) if n <= 16 * step)


def legend() -> dict[str, Any]:
    """Above the panels, on the left."""
    return {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"size": 12}}


def finish(figure: go.Figure, *, height: int) -> go.Figure:
    """Set template, margins, legend and fonts; nothing global."""
    return figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 60, "r": 20, "t": 40, "b": 60},
        legend=legend(),
        font={"family": "system-ui, sans-serif", "size": 13},
    )
