"""The figure of several studies side by side; a part of `plot`."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from tl_tomsparse._plot_style import GREY, RED, finish

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from tl_tomsparse.comparison import StudyComparison

_COLOURS = (RED, "#2471a3", "#d68910", "#1e8449", "#7d3c98", "#566573")
_TITLES = {"before": "under the mask", "random": "beyond random masks"}
_SPREAD = 0.7  # of the distance between two measures, that the models of one share


def study_comparison(found: StudyComparison) -> go.Figure:
    """How much each measure changes in each model: under the mask, and beyond random masks.

    Points have 95 % intervals; grey bars are the range over random masks. Accuracies above, in points; the
    loss of text below, in nats a token.
    """
    from plotly.subplots import make_subplots

    changes = found.frame[found.frame.minus.isna()]
    measures = list(dict.fromkeys(changes.measure))[::-1]
    accuracies = [measure for measure in measures if measure != "perplexity"]
    panels = ((accuracies, 100.0, "points"), (["perplexity"], 1.0, "nats a token"))
    figure = make_subplots(
        rows=2,
        cols=2,
        shared_yaxes=True,
        horizontal_spacing=0.04,
        vertical_spacing=80 / _height(measures, found),
        row_heights=[len(accuracies), 1.2],
        column_titles=[_TITLES[against] for against in ("before", "random")],
    )
    for row, (names, scale, unit) in enumerate(panels, start=1):
        for column, against in enumerate(("before", "random"), start=1):
            for place, model in enumerate(found.models.model):
                rows = changes[(changes.against == against) & (changes.model == model)]
                rows = rows.set_index("measure").reindex(names)
                offset = _SPREAD * (0.5 - (place + 0.5) / len(found.models))
                for trace in _traces(rows, offset, scale, unit, model, _COLOURS[place % len(_COLOURS)]):
                    trace.showlegend = row == column == 1
                    figure.add_trace(trace, row=row, col=column)
            line = {"color": GREY, "width": 1, "dash": "dot"}
            figure.add_vline(x=0, line=line, row=row, col=column)
            figure.update_xaxes(title=unit, row=row, col=column)
        figure.update_yaxes(
            tickvals=list(range(len(names))),
            ticktext=[_name(name) for name in names],
            range=[-0.6, len(names) - 0.4],
            row=row,
        )
    figure.update_yaxes(automargin=True)
    return finish(figure, height=_height(measures, found)).update_layout(margin_t=90, legend_y=1.06)


def _height(measures: list[str], found: StudyComparison) -> int:
    return 220 + len(measures) * (14 + 12 * len(found.models))


def _traces(
    rows: pd.DataFrame, offset: float, scale: float, unit: str, model: str, colour: str
) -> list[go.Scatter]:
    """The range of random masks, and the model's own points."""
    import plotly.graph_objects as go

    y = np.arange(len(rows)) + offset
    square = {"color": GREY, "size": 6, "symbol": "square"}
    shown = escape(model)  # plotly reads names as HTML
    kinds: list[tuple[str, str, dict[str, Any], float]] = []
    if rows.random.notna().any():
        kinds.append(("random", f"{shown}, random masks", square, 6))
    kinds.append(("", shown, {"color": colour, "size": 8}, 1.5))
    made = []
    for prefix, name, marker, width in kinds:
        columns = [prefix, f"{prefix}_low", f"{prefix}_high"] if prefix else ["value", "low", "high"]
        x, low, high = (scale * rows[column].to_numpy(np.float64) for column in columns)
        made.append(
            go.Scatter(
                x=x,
                y=y,
                name=name,
                mode="markers",
                marker=marker,
                legendgroup=model,
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": high - x,
                    "arrayminus": x - low,
                    "color": marker["color"],
                    "thickness": width,
                    "width": 0,
                },
                customdata=[[_name(measure), *ends] for measure, *ends in zip(rows.index, low, high)],
                hovertemplate="%{customdata[0]}: %{x:+.2f} "
                f"{unit}, %{{customdata[1]:+.2f}} to %{{customdata[2]:+.2f}}<extra>{name}</extra>",
            )
        )
    return made


def _name(measure: str) -> str:
    names = {"paired": "all agents of a story", "perplexity": "loss of text"}
    return names.get(measure, measure.replace("_", " "))
