"""One function per result, each returning a plotly `Figure`.

Nothing is drawn or shown here, and no template or renderer is set for the whole process. Figures show the numbers of a result as they
are: an interval is drawn only where the result has one, and its kind is named in the hover.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tl_tomsparse._checks import TomsparseError

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tl_tomsparse.effect import Effect
    from tl_tomsparse.experiment import KappaSweep
    from tl_tomsparse.mask import SparseMask

LABELS = {
    "false_belief": "false belief",
    "true_belief": "true belief",
    "reality": "reality",
    "memory": "memory",
    "second_order": "second order",
    "paired": "all agents of a story",
    "before": "unedited",
    "mask": "mask",
    "random": "random masks",
    "general_only": "general only",
    "tom_only": "ToM only",
}
_COLOURS = {
    "false_belief": "#c0392b",
    "true_belief": "#2471a3",
    "reality": "#1e8449",
    "memory": "#8d6e63",
    "second_order": "#7d3c98",
    "paired": "#17202a",
    "before": "#17202a",
    "mask": "#c0392b",
    "random": "#7f8c8d",
    "general_only": "#2471a3",
    "tom_only": "#b9770e",
}


def kappa_sweep(sweep: KappaSweep, *, chosen: float | None = None) -> go.Figure:
    """Accuracies (above) and perplexity (below) against sparsity, with the band of random masks.

    Kappas are evenly spaced steps, because they span decades and include 0. Lines are the mask's; the grey band spans the
    false-belief accuracies (below: perplexities) of all random masks; dotted is the unedited model.

    Args:
        sweep: from `kappa_sweep`.
        chosen: a kappa to mark.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    mask = sweep.arm("mask")
    kappas = list(mask.index)
    steps = list(range(len(kappas)))
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.68, 0.32], vertical_spacing=0.06)
    for row, measure in ((1, "false_belief"), (2, "perplexity")):
        band = sweep.band(measure)
        figure.add_trace(
            go.Scatter(
                x=steps + steps[::-1],
                y=[*band.high, *band.low[::-1]],
                fill="toself",
                fillcolor="rgba(127,140,141,0.25)",
                line={"width": 0},
                hoverinfo="skip",
                name=f"random masks, {'false belief' if row == 1 else 'perplexity'}: range of {sweep.meta['n_random']}",
                showlegend=row == 1,
            ),
            row=row,
            col=1,
        )
        baseline = mask[measure].iloc[0]
        figure.add_hline(y=baseline, line={"dash": "dot", "color": _COLOURS[measure if row == 1 else "random"], "width": 1},
                         row=row, col=1)  # fmt: skip
    for measure in ("paired", "second_order", "memory", "reality", "true_belief", "false_belief"):
        if mask[measure].isna().all():
            continue
        figure.add_trace(
            go.Scatter(
                x=steps,
                y=mask[measure],
                mode="lines+markers",
                name=LABELS[measure],
                line={"color": _COLOURS[measure], "width": 3 if measure == "false_belief" else 1.5},
                error_y=_exact_bars(mask[measure], sweep.n[measure]) if measure == "false_belief" else None,
                customdata=[[kappa, int(n), sweep.n[measure]] for kappa, n in zip(kappas, mask.n_weights)],
                hovertemplate="kappa %{customdata[0]:.3g}, %{customdata[1]} weights<br>%{y:.3f} of %{customdata[2]}"
                f"<extra>{LABELS[measure]}</extra>",
            ),
            row=1,
            col=1,
        )
    for arm, dash in (("mask", "solid"), ("general_only", "dash"), ("tom_only", "dot")):
        rows = sweep.arm(arm)  # type: ignore[arg-type]
        figure.add_trace(
            go.Scatter(
                x=steps,
                y=rows.perplexity,
                mode="lines+markers",
                name=f"perplexity, {LABELS[arm]}",
                line={"color": _COLOURS[arm], "dash": dash, "width": 1.5},
                hovertemplate="perplexity %{y:.4g}<extra>" + LABELS[arm] + "</extra>",
            ),
            row=2,
            col=1,
        )
    if chosen is not None:
        figure.add_vline(
            x=kappas.index(chosen), line={"color": "#c0392b", "width": 1, "dash": "dash"}, annotation_text="chosen",
            annotation_position="top right", row=1, col=1,
        )  # fmt: skip
    labels = [f"{kappa:.3g}<br>{int(n)}" for kappa, n in zip(kappas, mask.n_weights)]
    figure.update_xaxes(tickvals=steps, ticktext=labels, row=2, col=1, title="kappa, and below it the number of weights edited")
    figure.update_yaxes(title="accuracy (dev stories)", range=[-0.03, 1.03], row=1, col=1)
    figure.update_yaxes(title="perplexity", type="log", row=2, col=1, dtick="D2")
    return _finish(figure, height=620)


def accuracy(effect: Effect) -> go.Figure:
    """Accuracy of each category before and after, beside the controls, with the intervals of the effect's table."""
    import plotly.graph_objects as go

    table = effect.accuracy
    measures = list(dict.fromkeys(table.measure))
    figure = go.Figure()
    arms = list(dict.fromkeys(table.arm))
    for place, arm in enumerate(arms):
        rows = table[table.arm == arm].set_index("measure").loc[measures]
        figure.add_trace(
            go.Scatter(
                x=[i + (place - (len(arms) - 1) / 2) * 0.14 for i in range(len(measures))],
                y=rows.accuracy,
                mode="markers",
                name=f"{LABELS.get(arm, arm)} ({effect.n_weights[arm]} weights)",
                marker={"color": _COLOURS.get(arm, "#34495e"), "size": 9, "symbol": "square" if arm == "random" else "circle"},
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": rows.high - rows.accuracy,
                    "arrayminus": rows.accuracy - rows.low,
                    "thickness": 1.2,
                },
                customdata=rows[["low", "high", "interval", "n"]].to_numpy(),
                hovertemplate="%{y:.3f}, %{customdata[0]:.3f} to %{customdata[1]:.3f}<br>(%{customdata[2]}), n = %{customdata[3]}"
                f"<extra>{LABELS.get(arm, arm)}</extra>",
            )
        )
    before = table[table.arm == "before"].set_index("measure")
    for i, measure in enumerate(measures):
        chance = before.chance[measure]
        figure.add_shape(type="line", x0=i - 0.42, x1=i + 0.42, y0=chance, y1=chance, line={"dash": "dot", "color": "#95a5a6"})
    figure.update_xaxes(tickvals=list(range(len(measures))), ticktext=[LABELS[m] for m in measures])
    figure.update_yaxes(title="accuracy (held-out stories)", range=[-0.03, 1.03])
    return _finish(figure, height=430)


def mask_places(mask: SparseMask) -> go.Figure:
    """Where the masked weights lie: entries in each layer and head of Q, K, V, O, and in each layer of the MLP's matrices.

    Raises:
        TomsparseError: an empty mask.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    if not len(mask):
        raise TomsparseError("The mask is empty; there is nothing to show. Choose a larger kappa.")
    heads = mask.counts("head")
    panels: dict[str, list[list[int]]] = {}
    layers = sorted({layer for layer, _ in mask.shapes})
    for matrix in dict.fromkeys(name for _, name in mask.shapes):
        rows = []
        for layer in layers:
            key = (layer, matrix)
            if key not in mask.shapes:
                rows.append([0])
            elif len(mask.shapes[key]) == 3:
                rows.append([int(heads[layer, matrix, head]) for head in range(mask.shapes[key][0])])
            else:
                rows.append([len(mask.entries[key]) if key in mask.entries else 0])
        panels[matrix] = rows
    widths = [max(2, len(rows[0])) for rows in panels.values()]
    figure = make_subplots(
        rows=1, cols=len(panels), subplot_titles=[f"W_{name}" for name in panels], column_widths=widths, shared_yaxes=True,
        horizontal_spacing=0.04,
    )  # fmt: skip
    top = max(max(max(row) for row in rows) for rows in panels.values())
    for column, (matrix, rows) in enumerate(panels.items(), start=1):
        figure.add_trace(
            go.Heatmap(
                z=rows,
                x=list(range(len(rows[0]))),
                y=layers,
                zmin=0,
                zmax=top,
                colorscale="Viridis",
                showscale=column == len(panels),
                colorbar={"title": "weights"},
                texttemplate="%{z}" if len(layers) * sum(widths) <= 400 else None,
                hovertemplate="layer %{y}, head %{x}: %{z} weights<extra>W_" + matrix + "</extra>",
            ),
            row=1,
            col=column,
        )
        per_head = len(mask.shapes[next(key for key in mask.shapes if key[1] == matrix)]) == 3
        figure.update_xaxes(
            title=("kv head" if matrix in "KV" else "head") if per_head else "", dtick=1, showticklabels=per_head, row=1, col=column
        )
    figure.update_yaxes(dtick=1, autorange="reversed")
    figure.update_yaxes(title="layer", row=1, col=1)
    return _finish(figure, height=130 + 34 * min(len(layers), 32))


def _exact_bars(shares: Any, n: int) -> dict[str, Any]:
    from tl_tomsparse._intervals import proportion_interval

    bounds = [proportion_interval(round(share * n), n) for share in shares]
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - share for share, (_, high) in zip(shares, bounds)],
        "arrayminus": [share - low for share, (low, _) in zip(shares, bounds)],
        "thickness": 1,
        "width": 3,
    }


def _finish(figure: go.Figure, *, height: int) -> go.Figure:
    return figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 60, "r": 20, "t": 40, "b": 60},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        font={"family": "system-ui, sans-serif", "size": 13},
    )
