"""Figures of attention sinks, angles and attention; a part of `plot`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._plot_style import GREY, RED, finish, one_edit, step
from tl_tomsparse._sink_token import key_name
from tl_tomsparse.sink import BosAngles, check_alike

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from tl_tomsparse.patterns import AttentionPattern
    from tl_tomsparse.sink import SinkAttention

_BEFORE_AND_AFTER = ("unedited", "edited", "edited − unedited")
_DIGITS = 4  # of attention in a map


def bos_angles(angles: BosAngles, *, after: BosAngles | None = None) -> go.Figure:
    """Mean angle between queries and the key of one token, for each layer and head; white is orthogonal.

    Args:
        angles: what to show.
        after: show these beside `angles`, and the change.

    Raises:
        TomsparseError: angles of other samples, another token or other layers.
    """
    if after is not None:
        check_alike(angles, after)
    shown = [
        {layer: degrees.nanmean(0).numpy() for layer, degrees in one.to_sink.items()}
        for one in _both(angles, after)
    ]
    what = f"angle between queries and the key of {key_name(angles.position, angles.bos)}"
    return _maps(shown, what, "°", ("%{z:.1f}", "%{z:+.1f}"), middle=90.0)


def sinks(attention: SinkAttention, *, after: SinkAttention | None = None) -> go.Figure:
    """Mean attention to one token, for each layer and head.

    Args:
        attention: what to show.
        after: show this beside `attention`, and the change.

    Raises:
        TomsparseError: attention of other samples, another token or other layers.
    """
    if after is not None:
        check_alike(attention, after)
    shown = [
        {layer: share.nanmean(0).numpy() for layer, share in one.attention.items()}
        for one in _both(attention, after)
    ]
    what = f"attention to {key_name(attention.position, attention.bos)}, mean over queries"
    return _maps(shown, what, "", ("%{z:.2f}", "%{z:+.2f}"), middle=None)


def _both(first: Any, second: Any) -> list[Any]:
    return [first] if second is None else [first, second]


def _maps(
    shown: list[dict[int, Any]], what: str, unit: str, formats: tuple[str, str], *, middle: float | None
) -> go.Figure:
    """Layers by heads, one or two of them, and the change; one range of colours, from 0 or round a middle."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    layers = list(shown[0])
    panels = [np.stack([values[layer] for layer in layers]) for values in shown]
    titles = ("",) if len(panels) == 1 else _BEFORE_AND_AFTER
    if len(panels) == 2:
        panels.append(panels[1] - panels[0])
    figure = make_subplots(
        rows=1, cols=len(panels), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.03
    )
    written = panels[0].shape[1] * len(panels) <= 32 and len(layers) <= 40
    for place, z in enumerate(panels):
        form = formats[place == 2]
        figure.add_trace(
            go.Heatmap(
                z=z.astype(np.float32),
                x=np.arange(z.shape[1]),
                y=layers,
                coloraxis="coloraxis2" if place == 2 else "coloraxis",
                texttemplate=form if written else None,
                hovertemplate=f"layer %{{y}}, head %{{x}}: {form}{unit}"
                f"<extra>{'change of ' if place == 2 else ''}{what}</extra>",
                xgap=1,
                ygap=1,
            ),
            row=1,
            col=1 + place,
        )
    height = round(max(12.0, min(40.0, 500 / len(layers))) * len(layers))
    bar: dict[str, Any] = {"orientation": "h", "thickness": 12, "yanchor": "top", "y": -60 / height}
    levels = np.concatenate([panel.flatten() for panel in panels[:2]])
    name = f"{what} ({unit})" if unit else what
    several = len(panels) > 1
    figure.update_layout(
        coloraxis={
            **_range(levels, middle),
            "colorbar": {
                **bar,
                "title": {"text": name, "side": "top"},
                "len": 0.6,
                "x": 0.32 if several else 0.5,
            },
        }
    )
    if several:
        figure.update_layout(
            coloraxis2={
                **_range(panels[2], 0.0, reverse=middle is None),
                "colorbar": {
                    **bar,
                    "title": {"text": f"change{f' ({unit})' if unit else ''}", "side": "top"},
                    "len": 0.3,
                    "x": 0.85,
                },
            }
        )
    figure.update_yaxes(autorange="reversed", dtick=step(len(layers)))
    figure.update_yaxes(title="layer", col=1)
    figure.update_xaxes(dtick=step(panels[0].shape[1] * len(panels)), title="head")
    return finish(figure, height=height + 170).update_layout(margin_b=130)


def _range(values: Any, middle: float | None, *, reverse: bool = False) -> dict[str, Any]:
    """From 0 upwards in one colour, or as far to both sides of `middle`: blue above it, or reversed."""
    if middle is None:
        return {"colorscale": "Viridis", "cmin": 0, "cmax": max(1e-6, float(np.nanmax(values)))}
    reach = float(np.nanmax(np.abs(values - middle))) or 1.0
    return {"colorscale": "RdBu", "reversescale": reverse, "cmin": middle - reach, "cmax": middle + reach}


def angle_histogram(degrees: pd.DataFrame | BosAngles) -> go.Figure:
    """How many queries have which angle to the token's key: unedited, edited, and under random edits.

    Args:
        degrees: rows of one edit of `PositionEffects.degrees`; or the angles of one model, edited or not, of
            which one line is shown.

    Raises:
        TomsparseError: rows of several edits.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    lines: list[tuple[str, str, str, str]]
    if isinstance(degrees, BosAngles):
        degrees, lines = _shares(degrees), [("all heads", "share", RED, "solid")]
    else:
        one_edit(degrees)
        lines = [("unedited", "before", "#17202a", "dot"), ("edited", "after", RED, "solid")]
    drawn = [name for name in ("random_low", "random_high") if name in degrees]
    kinds = [heads for heads in ("sink", "all") if heads in set(degrees.heads)]
    names = {"sink": "sink heads", "all": "all heads"}
    figure = make_subplots(
        rows=len(kinds), cols=1, shared_xaxes=True, subplot_titles=[names[heads] for heads in kinds],
        vertical_spacing=0.12,
    )  # fmt: skip
    for row, heads in enumerate(kinds, start=1):
        of = degrees[degrees.heads == heads]
        there = np.flatnonzero((of[[*(column for _, column, _, _ in lines), *drawn]] > 0).any(axis=1))
        of = of.iloc[max(0, there[0] - 2) : there[-1] + 3]
        x = of.degree + 0.5
        common: dict[str, Any] = {"mode": "lines", "showlegend": row == 1}
        if drawn:
            figure.add_trace(
                go.Scatter(
                    x=[*x, *x[::-1]], y=[*of.random_high, *of.random_low[::-1]], fill="toself",
                    fillcolor="rgba(127,140,141,0.45)", line={"width": 0}, hoverinfo="skip",
                    name="random edits (range)", **common,
                ),
                row=row, col=1,
            )  # fmt: skip
        for name, column, colour, dash in lines:
            figure.add_trace(
                go.Scatter(
                    x=x, y=of[column], name=name,
                    line={"shape": "hvh", "color": colour, "dash": dash, "width": 2},
                    hovertemplate=f"%{{x:.0f}}°: %{{y:.2%}} of the queries<extra>{name}</extra>", **common,
                ),
                row=row, col=1,
            )  # fmt: skip
        figure.add_vline(x=90, line={"color": GREY, "width": 1, "dash": "dash"}, row=row, col=1)
        figure.update_yaxes(title="share of queries", tickformat=".1%", rangemode="tozero", row=row, col=1)
    figure.update_xaxes(ticksuffix="°", showticklabels=True)
    figure.update_xaxes(
        title="angle between query and the token's key (dashed: orthogonal)", row=len(kinds), col=1
    )
    return finish(figure, height=110 + 220 * len(kinds))


def _shares(angles: BosAngles) -> pd.DataFrame:
    """One row a degree: the share of the queries of all heads."""
    import pandas as pd

    counts = np.sum([count.sum(0).numpy() for count in angles.degrees.values()], axis=0)
    frame = pd.DataFrame({"degree": range(len(counts)), "share": counts / counts.sum()})
    return frame.assign(heads="all")


def attention(
    pattern: AttentionPattern, *, layer: int, head: int, after: AttentionPattern | None = None
) -> go.Figure:
    """Where each token of a text (row) looks (columns): one head, with the tokens on both axes.

    The upper triangle is empty: nothing looks ahead.

    Args:
        pattern: of the text.
        layer: of the head.
        head: one that `pattern` has.
        after: of the same text under an edit; buttons then show this, and the change.

    Raises:
        TomsparseError: a head that is not there, or another text.
    """
    import plotly.graph_objects as go

    shown = [one.of(layer, head).double().numpy() for one in _both(pattern, after)]
    if after is not None:
        if after.tokens != pattern.tokens:
            raise TomsparseError("The pattern after is of another text; measure both on the same one.")
        shown.append(shown[1] - shown[0])
    labels = [f"{place} {token}" for place, token in enumerate(pattern.tokens)]
    figure = go.Figure()
    for place, values in enumerate(shown):
        figure.add_trace(
            go.Heatmap(
                z=[np.round(row[: n + 1], _DIGITS).tolist() for n, row in enumerate(values)],
                x=labels,
                y=labels,
                visible=place == 0,
                coloraxis="coloraxis2" if place == 2 else "coloraxis",
                hovertemplate="%{y} looks at %{x}: %{z:.3f}<extra></extra>",
            )
        )
    height = min(1000, max(300, 10 * len(labels)))
    across, down = (math.ceil(len(labels) * size / room) for size, room in ((8, 860), (9, height)))
    ticks = [
        {"tickvals": labels[::between], "ticktext": pattern.tokens[::between], "tickfont": {"size": 9}}
        for between in (across, down)
    ]
    figure.update_xaxes(**ticks[0], tickangle=-90, title=f"key (layer {layer}, head {head})", showgrid=False)
    figure.update_yaxes(**ticks[1], autorange="reversed", title="query", showgrid=False)
    bar = {"thickness": 12, "len": 0.4, "x": 0.9, "y": 0.95, "yanchor": "top"}
    levels = np.concatenate([values.flatten() for values in shown[:2]])
    figure.update_layout(coloraxis={**_range(levels, None), "colorbar": {**bar, "title": "attention"}})
    finish(figure, height=height + 140)
    if after is not None:
        figure.update_layout(
            coloraxis2={
                **_range(shown[2], 0.0),
                "colorbar": {**bar, "title": "change of<br>attention"},
                "showscale": False,
            },
            updatemenus=[_before_and_after()],
            margin_t=60,
        )
    return figure


def _before_and_after() -> dict[str, Any]:
    buttons = [
        {
            "label": name,
            "method": "update",
            "args": [
                {"visible": [shown == place for shown in range(3)]},
                {"coloraxis.showscale": place < 2, "coloraxis2.showscale": place == 2},
            ],
        }
        for place, name in enumerate(_BEFORE_AND_AFTER)
    ]
    return {
        "type": "buttons",
        "direction": "right",
        "buttons": buttons,
        "x": 0,
        "xanchor": "left",
        "y": 1.01,
        "yanchor": "bottom",
    }
