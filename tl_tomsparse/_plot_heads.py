"""Figures of head knock-outs; a part of `plot`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tl_tomsparse._plot_style import GREY, finish, step
from tl_tomsparse.heads import head_name
from tl_tomsparse.recovery import HeadEffects

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tl_tomsparse.head_protocol import HeadsAndMask, PaperProtocol
    from tl_tomsparse.locate import HeadLocation

_RED, _BLUE = "#c0392b", "#2471a3"


def head_effects(effects: HeadEffects, *, value: str = "effect") -> go.Figure:
    """Effect of knocking out each head, layer by head: red raises the score, blue lowers it.

    Found heads are framed.

    Args:
        effects: from `recover_heads`, or `HeadLocation.effects`.
        value: a column of `effects.frame`: "effect" (of the solver) or "estimate" (least squares).
    """
    import plotly.graph_objects as go

    frame = effects.frame
    layers, n_heads = sorted(set(frame.layer)), int(frame["head"].max()) + 1
    row_of = {layer: row for row, layer in enumerate(layers)}
    shape = len(layers), n_heads
    z = np.full(shape, np.nan)
    told: np.ndarray = np.full((*shape, 5), np.nan, dtype=object)
    for row in frame.itertuples():
        place = row_of[row.layer], row.head
        z[place] = getattr(row, value)
        name = head_name((row.layer, row.head)) + (", found" if row.found else "")
        told[place] = [name, row.stability, row.estimate, row.low, row.high]
    top = float(np.nanmax(np.abs(z))) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=z.astype(np.float32),
            x=np.arange(n_heads),
            y=[str(layer) for layer in layers],
            customdata=told,
            colorscale="RdBu_r",
            zmin=-top,
            zmax=top,
            colorbar={"title": f"{value}<br>on score"},
            hovertemplate="%{customdata[0]}: %{z:+.3g}<br>chosen in %{customdata[1]:.0%} of resamples<br>"
            "least squares %{customdata[2]:+.3g}, %{customdata[3]:.3g} to %{customdata[4]:.3g}"
            "<extra></extra>",
            xgap=1,
            ygap=1,
        )
    )
    for layer, head in effects.found:
        y = row_of[layer]
        line = {"color": "#17202a", "width": 2}
        box = {"x0": head - 0.5, "x1": head + 0.5, "y0": y - 0.5, "y1": y + 0.5}
        figure.add_shape(type="rect", line=line, **box)
    figure.update_yaxes(type="category", autorange="reversed", dtick=step(len(layers)), title="layer")
    figure.update_xaxes(dtick=step(n_heads), title="head")
    return finish(figure, height=round(140 + max(12.0, min(40.0, 800 / len(layers))) * len(layers)))


def knockouts_predicted(effects: HeadEffects) -> go.Figure:
    """Each measurement against its held-out prediction from additive effects, with the held-out R^2."""
    import plotly.graph_objects as go

    ends = [float(min(effects.scores.min(), effects.predicted.min()))]
    ends.append(float(max(effects.scores.max(), effects.predicted.max())))
    figure = go.Figure()
    figure.add_trace(
        go.Scatter(
            x=ends, y=ends, mode="lines", line={"dash": "dot", "color": GREY}, hoverinfo="skip",
            name="equal",
        )
    )  # fmt: skip
    figure.add_trace(
        go.Scatter(
            x=effects.predicted,
            y=effects.scores,
            mode="markers",
            name="a measurement",
            marker={"color": _BLUE, "size": 7, "opacity": 0.7},
            hovertemplate="predicted %{x:.4g}, measured %{y:.4g}<extra></extra>",
        )
    )
    r2 = "not defined: the score never changes"
    if np.isfinite(effects.r2):
        r2 = f"{effects.r2:.2f} ({effects.r2_low:.2f} to {effects.r2_high:.2f})"
    figure.add_annotation(
        x=0.02, y=0.98, xref="paper", yref="paper", xanchor="left", yanchor="top", showarrow=False,
        text=f"held-out R<sup>2</sup> {r2}",
    )  # fmt: skip
    figure.update_xaxes(title=f"predicted {effects.name}")
    figure.update_yaxes(title=f"measured {effects.name}")
    return finish(figure, height=440)


def recovery_path(location: HeadLocation) -> go.Figure:
    """Score after knocking out the first heads of the path, beside as many random heads (grey: range).

    With test prompts there is a second panel for these. Filled points are confirmed heads.
    """
    from plotly.subplots import make_subplots

    path = location.path
    prefixes = [("", "prompts the heads were found on")]
    if "test_score" in path:
        prefixes.append(("test_", "test prompts"))
    figure = make_subplots(
        rows=1, cols=len(prefixes), shared_yaxes=True, subplot_titles=[title for _, title in prefixes],
        horizontal_spacing=0.05,
    )  # fmt: skip
    marker = ["circle" if n <= len(location.heads) else "circle-open" for n in path.n_heads]
    for column, (prefix, _) in enumerate(prefixes, start=1):
        part = path.rename(columns={f"{prefix}{name}": f"_{name}" for name in _BAND})
        _dose(figure, part, column, marker=marker)
    labels = ["none", *(f"+ {name}" for name in path["head"][1:])]
    figure.update_xaxes(tickvals=path.n_heads, ticktext=labels, title="heads out")
    figure.update_yaxes(title=location.knockouts.name, col=1)
    return _titled(finish(figure, height=420))


def dose_curve(protocol: PaperProtocol) -> go.Figure:
    """Score of each task after knocking out 1, 2, ... found heads, beside random heads (grey: range)."""
    from plotly.subplots import make_subplots

    tasks = list(dict.fromkeys(protocol.dose.task))
    across = min(3, len(tasks))
    down = -(-len(tasks) // across)
    figure = make_subplots(
        rows=down, cols=across, subplot_titles=tasks, horizontal_spacing=0.07, shared_yaxes="all",
        vertical_spacing=0.3 / down,
    )  # fmt: skip
    for place, task in enumerate(tasks):
        part = protocol.dose[protocol.dose.task == task]
        part = part.rename(columns={name: f"_{name}" for name in _BAND})
        _dose(figure, part, place % across + 1, row=place // across + 1, legend=place == 0)
    names = ", ".join(map(head_name, protocol.heads)) or "none"
    figure.update_xaxes(dtick=1)
    figure.update_xaxes(title=f"heads out ({names})" if across == 1 else "heads out", row=down)
    figure.update_yaxes(title="score", col=1)
    return _titled(finish(figure, height=130 + 240 * down))


def heads_and_mask(crossed: HeadsAndMask) -> go.Figure:
    """Share of a mask's weights that lie in the heads, by matrix, beside random masks and random heads.

    Points of random ones are means, bars ranges.
    """
    import plotly.graph_objects as go

    table = crossed.overlap
    figure = go.Figure()
    rows = (
        ("mask in these heads", "share", None, _RED, "circle"),
        ("random masks in these heads", "random", "random", GREY, "square"),
        ("mask in random heads", "heads_mean", "heads", _BLUE, "diamond"),
    )
    for shift, (name, mean, ends, colour, symbol) in zip((-0.2, 0.0, 0.2), rows):
        bars: dict[str, Any] | None = None
        if ends is not None:
            up, down = table[f"{ends}_high"] - table[mean], table[mean] - table[f"{ends}_low"]
            bars = {"type": "data", "symmetric": False, "array": up, "arrayminus": down}
        figure.add_trace(
            go.Scatter(
                x=np.arange(len(table)) + shift,
                y=table[mean],
                error_y=bars,
                mode="markers",
                name=name,
                marker={"color": colour, "size": 10, "symbol": symbol},
                customdata=table[["matrix", "entries"]],
                hovertemplate="%{customdata[0]}: %{y:.3f} of %{customdata[1]} weights"
                f"<extra>{name}</extra>",
            )
        )
    figure.update_xaxes(tickvals=np.arange(len(table)), ticktext=table.matrix, title="matrix")
    figure.update_yaxes(title="share of the mask's weights", rangemode="tozero")
    return finish(figure, height=420)


def heads_section(
    location: HeadLocation, *, protocol: PaperProtocol | None = None, crossed: HeadsAndMask | None = None
) -> dict[str, Any]:
    """Everything that a page about heads needs.

    Args:
        location: from `locate_heads`.
        protocol: from `paper_protocol`.
        crossed: from `heads_and_mask`.

    Returns:
        "claims": a list of [`Claim`][tl_tomsparse.Claim]; "figures": `Figure`s by title; "frames": DataFrames
        by title; "meta": how it was made.
    """
    figures = {
        "effect of each head": head_effects(location.effects),
        "predicted and measured": knockouts_predicted(location.effects),
        "recovery path": recovery_path(location),
    }
    frames = {
        "heads": location.to_frame(),
        "path": location.path,
        "interactions": location.interactions,
        "ways to find heads": location.methods,
        "on test prompts": location.test,
        "pilot": location.pilot,
    }
    claims = list(location.claims)
    if protocol is not None:
        figures["dose curve"] = dose_curve(protocol)
        frames["dose curve"] = protocol.dose
        claims += protocol.claims
    if crossed is not None:
        figures["weights of the mask in these heads"] = heads_and_mask(crossed)
        frames["weights of the mask in these heads"] = crossed.overlap
        frames["effect of the mask in these heads"] = crossed.effect
        frames["attention of these heads"] = crossed.position
        claims += crossed.claims
    return {"claims": claims, "figures": figures, "frames": frames, "meta": location.meta}


_BAND = ("score", "random", "random_low", "random_high")


def _dose(
    figure: go.Figure,
    part: Any,
    column: int,
    *,
    row: int = 1,
    legend: bool | None = None,
    marker: Any = "circle",
) -> None:
    """The score of found heads over the range of random ones, in one panel."""
    import plotly.graph_objects as go

    shown = column == 1 if legend is None else legend
    n = list(part.n_heads)
    where = {"row": row, "col": column}
    figure.add_trace(
        go.Scatter(
            x=n + n[::-1], y=[*part._random_high, *part._random_low[::-1]], mode="lines", fill="toself",
            fillcolor="rgba(127,140,141,0.25)", line={"width": 0}, hoverinfo="skip",
            name="random heads, range", showlegend=shown,
        ),
        **where,
    )  # fmt: skip
    for name, y, colour, dash in (
        ("random heads, mean", part._random, GREY, "dot"),
        ("found heads", part._score, _RED, "solid"),
    ):
        found = dash == "solid"
        figure.add_trace(
            go.Scatter(
                x=n, y=y, mode="lines+markers" if found else "lines", name=name, showlegend=shown,
                line={"color": colour, "dash": dash}, marker={"symbol": marker, "size": 9} if found else None,
                hovertemplate=f"%{{x}} heads out: %{{y:.4g}}<extra>{name}</extra>",
            ),
            **where,
        )  # fmt: skip


def _titled(figure: go.Figure) -> go.Figure:
    """Room for the legend above the titles of panels."""
    return figure.update_layout(margin={"t": 80}, legend={"y": 1.13})
