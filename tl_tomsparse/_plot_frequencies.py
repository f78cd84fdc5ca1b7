"""Figures of rotary frequencies; a part of `plot`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tl_tomsparse._checks import TomsparseError, check_choice
from tl_tomsparse._plot_style import RED, finish, one_edit, step
from tl_tomsparse._sink_token import key_name
from tl_tomsparse.sink import BosAngles, check_alike

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from tl_tomsparse.rotary import FrequencyNorms, RotaryLayer, RotaryLayout

Floats = NDArray[np.floating[Any]]
_TURN = ", a turn in "
_MOST_ROWS = 100  # heads that are shown all at once; of more, layers first, and each layer's heads on request


class _View(NamedTuple):
    """What is shown at once: `[rows, frequencies]` of each panel, what rows and columns are called, and where
    rows differ in them the wavelengths, `[rows, frequencies]`.
    """

    name: str
    rows: str
    labels: Sequence[Any]
    columns: Sequence[str]
    panels: Sequence[Floats]
    waves: Floats | None = None


class _Quantity(NamedTuple):
    """What colours mean: its name, the title of the colour bar, what a row of a head is called, whether it
    has a sign, and how the heads of a layer become one row.
    """

    name: str
    title: str
    head: str
    signed: bool
    over_heads: Callable[[Floats], Floats]


def frequency_norms(
    norms: FrequencyNorms, *, part: str = "q", before: FrequencyNorms | None = None
) -> go.Figure:
    """Norm (root mean square) of each rotary frequency in each head, fast frequencies on the left.

    With more than 100 heads rows are layers (root mean square over their heads), and a menu shows the heads
    of one layer. Panels of norms side by side have one range of colours.

    Args:
        norms: what to show.
        part: "q" or "k" (key-value heads).
        before: show these first, then `norms`, then the change.

    Raises:
        TomsparseError: another part, or norms of other layers and heads.
    """
    check_choice("part", part, ("q", "k"))
    what, head = {"q": ("queries", "head"), "k": ("keys", "key-value head")}[part]

    def root_mean_square(heads: Floats) -> Floats:
        return (heads**2).mean(0, keepdims=True) ** 0.5

    shown = [
        {layer: one.rms[layer, part].numpy() for layer in one.layout}
        for one in ([norms] if before is None else [before, norms])
    ]
    quantity = _Quantity("norm", f"norm of {what}", head, False, root_mean_square)
    return _heatmaps(norms.layout, shown, quantity, "norms before")


def bos_cosines(angles: BosAngles, *, after: BosAngles | None = None) -> go.Figure:
    """What each rotary frequency adds to the cosine between queries and the token's key, in each head: fast
    frequencies on the left, and blue where a frequency turns queries away from the key.

    With more than 100 heads rows are layers (mean over their heads), and a menu shows the heads of one layer.

    Args:
        angles: what to show.
        after: of an edited model: show these beside `angles`, then the change.

    Raises:
        TomsparseError: angles of other samples, another token or other layers, or not both after rotation.
    """
    if after is not None:
        check_alike(angles, after)

    def mean(heads: Floats) -> Floats:
        return heads.mean(0, keepdims=True)

    shown = [
        {layer: values.numpy() for layer, values in one.cosine.items()}
        for one in ([angles] if after is None else [angles, after])
    ]
    title = f"part of the cosine with the key of {key_name(angles.position, angles.bos)}"
    quantity = _Quantity("part of the cosine", title, "head", True, mean)
    return _heatmaps(angles.layout, shown, quantity, "angles after")


def _heatmaps(
    layout: RotaryLayout, shown: Sequence[Mapping[int, Floats]], quantity: _Quantity, others: str
) -> go.Figure:
    """Panels of `[heads, frequencies]` by layer; of two, a third shows the change."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    first = shown[0]
    for values in shown:
        if {n: one.shape for n, one in values.items()} != {n: one.shape for n, one in first.items()}:
            raise TomsparseError(f"The {others} are of another model; measure both on the same one.")
    views = _views(layout, shown, quantity)
    titles = [quantity.name] if len(shown) == 1 else ["unedited", "edited", "edited − unedited"]
    figure = make_subplots(
        rows=1, cols=len(titles), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.03
    )
    for number, view in enumerate(views):
        turn = "" if view.waves is None else f"{_TURN}%{{customdata:.4g}} tokens"
        for place, z in enumerate(view.panels):
            figure.add_trace(
                go.Heatmap(
                    z=z,
                    x=view.columns,
                    y=view.labels,
                    customdata=view.waves,
                    coloraxis="coloraxis2" if place == 2 else "coloraxis",
                    visible=number == 0,
                    hovertemplate=f"{view.rows} %{{y}}<br>frequency %{{x}}{turn}<br>"
                    f"{'change of ' if place == 2 else ''}{quantity.name} %{{z:.4g}}<extra></extra>",
                ),
                row=1,
                col=1 + place,
            )
    figure.update_layout(_axes(views[0], len(titles)))
    if len(views) > 1:
        buttons = [
            {
                "label": view.name,
                "method": "update",
                "args": [
                    {"visible": [shown == number for shown in range(len(views)) for _ in titles]},
                    _axes(view, len(titles)) | _ranges(view, quantity),
                ],
            }
            for number, view in enumerate(views)
        ]
        menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.12, "yanchor": "bottom"}
        figure.update_layout(updatemenus=[menu])
    rows = len(views[0].labels)
    panel = round(max(5.0, min(16.0, 760 / rows)) * rows) if len(views) == 1 else 400
    above, below = 90 if len(views) > 1 else 40, 130
    _colours(figure, views[0], quantity, panel)
    return finish(figure, height=above + panel + below).update_layout(margin={"t": above, "b": below})


def _views(layout: RotaryLayout, shown: Sequence[Mapping[int, Floats]], quantity: _Quantity) -> list[_View]:
    layers, n_heads = list(layout), {layer: len(values) for layer, values in shown[0].items()}
    width = max(len(layout[layer].frequencies) for layer in layers)
    alike = len({tuple(layout[layer].frequencies.tolist()) for layer in layers}) == 1
    columns = _columns(layout[layers[0]]) if alike else [str(m) for m in range(width)]

    def view(
        name: str,
        rows: str,
        labels: Sequence[Any],
        columns: Sequence[str],
        values: list[Floats],
        waves: Floats | None = None,
    ) -> _View:
        if len(values) > 1:
            values = [*values, values[1] - values[0]]
        return _View(name, rows, labels, columns, [value.astype(np.float32) for value in values], waves)

    def padded(value: Floats) -> Floats:
        return np.pad(value, ((0, 0), (0, width - value.shape[1])), constant_values=np.nan)

    def waves(rows: Mapping[int, int]) -> Floats | None:
        if alike:
            return None
        each = [padded(layout[layer].wavelengths.numpy()[None].repeat(n, 0)) for layer, n in rows.items()]
        return np.concatenate(each).astype(np.float32)

    heads = [f"L{layer}H{head}" for layer in layers for head in range(n_heads[layer])]
    if len(heads) <= _MOST_ROWS:
        every = [np.concatenate([padded(of[layer]) for layer in layers]) for of in shown]
        return [view("all heads", quantity.head, heads, columns, every, waves(n_heads))]
    means = [np.concatenate([padded(quantity.over_heads(of[layer])) for layer in layers]) for of in shown]
    each = [
        view(
            f"heads of layer {layer}", f"layer {layer}, {quantity.head}", list(range(n_heads[layer])),
            _columns(layout[layer]), [of[layer] for of in shown],
        )
        for layer in layers
    ]  # fmt: skip
    each_layer = waves(dict.fromkeys(layers, 1))
    return [view("all layers (over their heads)", "layer", layers, columns, means, each_layer), *each]


def _columns(layer: RotaryLayer) -> list[str]:
    return [_column(m, wave) for m, wave in enumerate(layer.wavelengths.tolist())]


def _axes(view: _View, n_panels: int) -> dict[str, Any]:
    """Ticks name wavelengths, since numbers of frequencies say nothing; where layers differ, numbers."""
    between = step(len(view.columns))
    ticks = view.columns[:: between if n_panels == 1 else max(between, -(-len(view.columns) // 5))]
    axes: dict[str, Any] = {}
    for place in range(n_panels):
        number = "" if place == 0 else str(place + 1)
        axes[f"xaxis{number}.tickvals"], axes[f"xaxis{number}.ticktext"] = (
            list(ticks),
            list(map(_short, ticks)),
        )
        axes[f"xaxis{number}.title.text"] = _direction(view.columns[0])
        axes[f"yaxis{number}.autorange"] = "reversed"
        axes[f"yaxis{number}.dtick"] = step(len(view.labels))
    return axes | {"yaxis.title.text": view.rows}


def _ranges(view: _View, quantity: _Quantity) -> dict[str, float]:
    """Of the colours: one for all values that are shown at once, another one for their change."""
    top = max(float(np.nanmax(np.abs(panel))) for panel in view.panels[:2]) or 1.0
    found = {"coloraxis.cmin": -top if quantity.signed else 0.0, "coloraxis.cmax": top}
    for change in view.panels[2:]:
        reach = float(np.nanmax(np.abs(change))) or 1.0
        found |= {"coloraxis2.cmin": -reach, "coloraxis2.cmax": reach}
    return found


def _colours(figure: go.Figure, view: _View, quantity: _Quantity, height: int) -> None:
    """Each bar below its panels of this height."""
    bar: dict[str, Any] = {"orientation": "h", "thickness": 12, "yanchor": "top", "y": -60 / height}
    diverging = {"colorscale": "RdBu", "reversescale": True}
    several = len(view.panels) > 1
    place = {"x": 0.32 if several else 0.5, "len": 0.6}
    figure.update_layout(
        coloraxis={
            **(diverging if quantity.signed else {"colorscale": "Viridis"}),
            "colorbar": {**bar, **place, "title": {"text": quantity.title, "side": "top"}},
        }
    )
    if several:
        title = {"text": f"change of {quantity.name}", "side": "top"}
        figure.update_layout(
            coloraxis2={**diverging, "colorbar": {**bar, "x": 0.85, "len": 0.3, "title": title}}
        )
    figure.update_layout(_ranges(view, quantity))


def mask_by_frequency(frame: pd.DataFrame) -> go.Figure:
    """Entries of a mask at each rotary frequency (bars) over the range of random masks (grey: central 95 %).

    Args:
        frame: from [`mask_by_frequency`][tl_tomsparse.mask_by_frequency], of one mask; of several kinds of
            random masks the first is shown.

    Raises:
        TomsparseError: rows of several edits.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    one_edit(frame)
    frame = frame[frame["match"] == frame["match"].iloc[0]]
    matrices = list(dict.fromkeys(frame.matrix))
    figure = make_subplots(
        rows=len(matrices), cols=1, shared_xaxes=True, subplot_titles=[f"W_{m}" for m in matrices],
        vertical_spacing=0.12,
    )  # fmt: skip
    waves = frame.wavelength if "wavelength" in frame else np.full(len(frame), np.nan)
    names = ["not rotated" if m < 0 else _column(int(m), wave) for m, wave in zip(frame.frequency, waves)]
    for row, matrix in enumerate(matrices, start=1):
        there = (frame.matrix == matrix).to_numpy()
        part, x = frame[there], [name for name, chosen in zip(names, there) if chosen]
        figure.add_trace(
            go.Bar(
                x=x,
                y=part.random_high - part.random_low,
                base=part.random_low,
                width=1,
                name="random masks (central 95 %)",
                marker={"color": "#bdc3c7", "line": {"width": 0}},
                showlegend=row == 1,
                customdata=part[["random_mean", "random_low", "random_high"]],
                hovertemplate="frequency %{x}<br>%{customdata[0]:.1f} entries, "
                "%{customdata[1]:.0f} to %{customdata[2]:.0f}<extra>random masks</extra>",
            ),
            row=row,
            col=1,
        )
        figure.add_trace(
            go.Bar(
                x=x,
                y=part.entries,
                width=0.5,
                name="mask",
                marker={"color": RED, "line": {"width": 0}},
                showlegend=row == 1,
                customdata=part[["enrichment", "p"]],
                hovertemplate="frequency %{x}<br>%{y} entries, %{customdata[0]:.2f} times a random mask "
                "(p = %{customdata[1]:.3g})<extra>mask</extra>",
            ),
            row=row,
            col=1,
        )
        figure.update_yaxes(title="entries", rangemode="tozero", row=row, col=1)
    ticks = list(dict.fromkeys(names))
    ticks = ticks[:: step(len(ticks))]
    figure.update_xaxes(type="category", tickvals=ticks, ticktext=[_short(name) for name in ticks])
    figure.update_xaxes(title=_direction(names[0]), row=len(matrices), col=1)
    return finish(figure, height=120 + 220 * len(matrices)).update_layout(barmode="overlay")


def _column(m: int, wave: float) -> str:
    """What a frequency is called: by its wavelength, too, where one is known."""
    return f"{m}{_TURN}{_rounded(wave)} tokens" if np.isfinite(wave) else str(m)


def _short(column: str) -> str:
    return column.partition(_TURN)[2].removesuffix(" tokens") or column


def _direction(column: str) -> str:
    return f"fast ← {'tokens for a turn' if _TURN in column else 'frequency'} → slow"


def _rounded(wave: float) -> str:
    """Three digits: 6.28, 354, 1.99k, 3.53M."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if wave >= 0.9995 * unit:
            return f"{wave / unit:.3g}{letter}"
    return f"{wave:.3g}"
