"""Figures of rotary frequencies and attention sinks; a part of `plot`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tl_tomsparse._checks import TomsparseError, check_choice
from tl_tomsparse._plot_style import GREY, finish, step
from tl_tomsparse.sink import check_alike

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from tl_tomsparse.rotary import FrequencyNorms
    from tl_tomsparse.sink import BosAngles, SinkAttention


def frequency_norms(
    norms: FrequencyNorms, *, part: str = "q", before: FrequencyNorms | None = None
) -> go.Figure:
    """Norm (root mean square) of each rotary frequency in each head, fast frequencies on the left.

    Args:
        norms: what to show.
        part: "q" or "k" (key-value heads).
        before: show the change from these to `norms` instead.

    Raises:
        TomsparseError: another part, or norms of other layers and heads.
    """
    import plotly.graph_objects as go

    check_choice("part", part, ("q", "k"))
    layers = list(norms.layout)
    width = max(len(norms.layout[layer].frequencies) for layer in layers)
    rows, names, waves = [], [], []
    for layer in layers:
        rms = norms.rms[layer, part].numpy()
        if before is not None:
            if (layer, part) not in before.rms or before.rms[layer, part].shape != rms.shape:
                raise TomsparseError("The norms before are of another model; measure both on the same one.")
            rms = rms - before.rms[layer, part].numpy()
        pad = np.full((len(rms), width - rms.shape[1]), np.nan)
        rows.append(np.concatenate([rms, pad], 1))
        wavelengths = np.concatenate([norms.layout[layer].wavelengths.numpy(), np.full(pad.shape[1], np.nan)])
        waves.append(np.tile(wavelengths, (len(rms), 1)))
        names += [f"L{layer}H{head}" for head in range(len(rms))]
    z = np.concatenate(rows).astype(np.float32)
    colours: dict[str, Any] = {"colorscale": "Viridis", "zmin": 0}
    if before is not None:
        top = float(np.nanmax(np.abs(z))) or 1.0
        colours = {"colorscale": "RdBu", "reversescale": True, "zmin": -top, "zmax": top}
    title = f"{'change of ' if before is not None else ''}norm of {part}"
    figure = go.Figure(
        go.Heatmap(
            z=z,
            x=np.arange(width),
            y=names,
            customdata=np.concatenate(waves).astype(np.float32),
            colorbar={"title": title},
            hovertemplate="%{y}, frequency %{x}: %{z:.4g}<br>"
            "a turn in %{customdata:.4g} tokens<extra></extra>",
            **colours,
        )
    )
    figure.update_yaxes(
        autorange="reversed", dtick=step(len(names)), title="head" if part == "q" else "kv head"
    )
    figure.update_xaxes(title="frequency, from fast to slow", dtick=step(width))
    return finish(figure, height=round(140 + max(4.0, min(16.0, 900 / len(names))) * len(names)))


def mask_by_frequency(frame: pd.DataFrame) -> go.Figure:
    """Entries of a mask at each rotary frequency (bars) over the range of random masks (grey: central 95 %).

    Args:
        frame: from [`mask_by_frequency`][tl_tomsparse.mask_by_frequency].
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    matrices = list(dict.fromkeys(frame.matrix))
    figure = make_subplots(rows=len(matrices), cols=1, subplot_titles=[f"W_{m}" for m in matrices])
    for row, matrix in enumerate(matrices, start=1):
        part = frame[frame.matrix == matrix]
        x = ["not rotated" if m < 0 else str(m) for m in part.frequency]
        figure.add_trace(
            go.Bar(
                x=x,
                y=part.entries,
                name="mask",
                marker_color="#c0392b",
                showlegend=row == 1,
                customdata=np.stack([part.enrichment, part.p], 1),
                hovertemplate="frequency %{x}: %{y} entries, %{customdata[0]:.2f} times a random mask"
                " (p = %{customdata[1]:.3g})<extra></extra>",
            ),
            row=row,
            col=1,
        )
        figure.add_trace(
            go.Scatter(
                x=x,
                y=part.random_mean,
                name="random masks",
                mode="markers",
                marker={"color": GREY, "symbol": "line-ew-open", "size": 14},
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": part.random_high - part.random_mean,
                    "arrayminus": part.random_mean - part.random_low,
                    "color": GREY,
                },
                showlegend=row == 1,
                hovertemplate="frequency %{x}: %{y:.1f} entries<extra>random masks</extra>",
            ),
            row=row,
            col=1,
        )
        figure.update_yaxes(title="entries", rangemode="tozero", row=row, col=1)
        figure.update_xaxes(type="category", row=row, col=1)
    figure.update_xaxes(title="frequency, from fast to slow", row=len(matrices), col=1)
    return finish(figure, height=120 + 240 * len(matrices))


def bos_angles(angles: BosAngles, *, after: BosAngles | None = None) -> go.Figure:
    """Mean angle between queries and the key of one token, for each layer and head.

    Args:
        angles: what to show.
        after: show how much these differ from `angles` instead.

    Raises:
        TomsparseError: angles of other samples, another token or other layers.
    """
    values = {layer: degrees.nanmean(0).numpy() for layer, degrees in angles.to_sink.items()}
    if after is None:
        return _map(values, "angle", "degrees", "%{z:.1f}°", middle=90.0)
    check_alike(angles, after)
    change = {layer: after.to_sink[layer].nanmean(0).numpy() - before for layer, before in values.items()}
    return _map(change, "change of angle", "degrees", "%{z:+.2f}°", middle=0.0)


def sinks(attention: SinkAttention, *, after: SinkAttention | None = None) -> go.Figure:
    """Mean attention to one token, for each layer and head.

    Args:
        attention: what to show.
        after: show how much these differ from `attention` instead.

    Raises:
        TomsparseError: attention of other samples, another token or other layers.
    """
    values = {layer: share.nanmean(0).numpy() for layer, share in attention.attention.items()}
    if after is None:
        return _map(values, "attention", "share", "%{z:.3f}", middle=None)
    check_alike(attention, after)
    change = {layer: after.attention[layer].nanmean(0).numpy() - before for layer, before in values.items()}
    return _map(change, "change of attention", "share", "%{z:+.3f}", middle=0.0)


def _map(values: dict[int, Any], what: str, unit: str, shown: str, *, middle: float | None) -> go.Figure:
    """Layers by heads; around `middle` in two colours, or from 0 upwards in one."""
    import plotly.graph_objects as go

    layers = list(values)
    z = np.stack([values[layer] for layer in layers])
    colours: dict[str, Any] = {"colorscale": "Viridis", "zmin": 0, "zmax": max(1e-6, float(np.nanmax(z)))}
    if middle is not None:
        top = float(np.nanmax(np.abs(z - middle))) or 1.0
        colours = {"colorscale": "RdBu", "zmid": middle, "zmin": middle - top, "zmax": middle + top}
    few = z.size <= 200
    figure = go.Figure(
        go.Heatmap(
            z=z.astype(np.float32),
            x=np.arange(z.shape[1]),
            y=layers,
            colorbar={"title": f"{what}<br>({unit})"},
            texttemplate=shown if few else None,
            hovertemplate=f"layer %{{y}}, head %{{x}}: {shown}<extra>{what}</extra>",
            xgap=1,
            ygap=1,
            **colours,
        )
    )
    figure.update_yaxes(autorange="reversed", dtick=step(len(layers)), title="layer")
    figure.update_xaxes(dtick=step(z.shape[1]), title="head")
    return finish(figure, height=round(140 + max(12.0, min(40.0, 800 / len(layers))) * len(layers)))
