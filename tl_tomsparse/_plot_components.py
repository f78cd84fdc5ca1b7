"""The figure of component effects; a part of `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._plot_style import GREY, RED, finish

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tl_tomsparse.components import ComponentEffects

_NAMES = {
    "false_belief": "false belief",
    "true_belief": "true belief",
    "second_order": "second order",
    "paired": "all agents",
    "log_perplexity": "loss (nats)",
    "sinks_shifted": "sinks moved",
    "sink_rate": "share of sinks",
    "attention": "attention to it",
    "turn": "turn of q (°)",
    "turn_others": "other keys (°)",
    "norm_q": "norm of q",
    "norm_k": "norm of k",
}
_AXES = {
    "log_perplexity": "change (nats)",
    "sinks_shifted": "share of sinks",
    "sink_rate": "change of share",
    "attention": "change of share",
    "turn": "degrees from 90",
    "turn_others": "degrees from 90",
    "norm_q": "relative change",
    "norm_k": "relative change",
}
_FIRST = ("false_belief", "true_belief", "log_perplexity", "turn", "sinks_shifted")


def component_effects(found: ComponentEffects, *, measures: Sequence[str] | None = None) -> go.Figure:
    """What each part of an edit does (red, 95 % interval) beside random edits like it (grey, their range).

    Dotted is no change; a part without entries says so.

    Args:
        found: from [`component_effects`][tl_tomsparse.component_effects].
        measures: of its frame, a panel each; by default false belief, true belief, loss, turn and sinks, as
            far as they were measured, and otherwise all.

    Raises:
        TomsparseError: a measure that was not taken.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    there = list(dict.fromkeys(found.frame.measure))
    if measures is None:
        measures = [name for name in _FIRST if name in there] or there
    if unknown := [name for name in measures if name not in there]:
        raise TomsparseError(
            f"measures has {unknown[0]!r}, which was not taken; there are {', '.join(there)}."
        )
    figure = make_subplots(
        rows=1, cols=len(measures), shared_yaxes=True, horizontal_spacing=0.02,
        subplot_titles=[_NAMES.get(name, name) for name in measures],
    )  # fmt: skip
    square = {"color": GREY, "size": 8, "symbol": "square"}
    first = found.frame.drop_duplicates("component")
    labels = {row.component: f"{row.component} ({row.entries})" for row in first.itertuples()}
    for place, measure in enumerate(measures, start=1):
        rows = found.frame[found.frame.measure == measure]
        full, empty = rows[rows.note == ""], rows[rows.note != ""]
        y = [labels[name] for name in full.component]
        common: dict[str, Any] = {"y": y, "mode": "markers", "showlegend": place == 1}
        for x, low, high, name, marker, width in (
            (full.random, full.random_low, full.random_high, "random edits", square, 8),
            (full.value, full.low, full.high, "part", {"color": RED, "size": 7}, 1.5),
        ):
            figure.add_trace(
                go.Scatter(
                    x=x,
                    name=name,
                    marker=marker,
                    error_x={
                        "type": "data", "symmetric": False, "array": high - x, "arrayminus": x - low,
                        "color": marker["color"], "thickness": width, "width": 0 if width > 2 else 3,
                    },
                    customdata=[list(pair) for pair in zip(low, high)],
                    hovertemplate="%{y}: %{x:.4g}, %{customdata[0]:.4g} to %{customdata[1]:.4g}"
                    f"<extra>{name}</extra>",
                    **common,
                ),
                row=1,
                col=place,
            )  # fmt: skip
        figure.add_trace(
            go.Scatter(
                x=[0.0] * len(empty), y=[labels[name] for name in empty.component], mode="text",
                text=list(empty.note), textfont={"size": 10, "color": GREY}, showlegend=False,
                hoverinfo="skip",
            ),
            row=1, col=place,
        )  # fmt: skip
        figure.add_vline(x=0, line={"color": GREY, "width": 1, "dash": "dot"}, row=1, col=place)
        axis = {"text": _AXES.get(measure, "change of accuracy"), "font": {"size": 12}}
        figure.update_xaxes(title=axis, row=1, col=place)
    order = [labels[name] for name in first.component]
    figure.update_yaxes(categoryorder="array", categoryarray=order[::-1])
    figure.update_xaxes(nticks=5)
    return finish(figure, height=180 + 26 * len(order)).update_layout(
        margin_t=80, legend_y=1 + 30 / (26 * len(order))
    )
