"""What all figures have in common; a part of `plot`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tl_tomsparse._checks import TomsparseError

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

GREY, RED = "#95a5a6", "#c0392b"


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


def one_edit(frame: pd.DataFrame) -> None:
    """Refuse rows of several edits, which a figure would pile up."""
    edits = list(frame.edit.unique()) if "edit" in frame else []
    if len(edits) > 1:
        raise TomsparseError(
            f"The rows are of several edits ({', '.join(edits)}); pass those of one, as "
            f"frame[frame.edit == {edits[0]!r}]."
        )
