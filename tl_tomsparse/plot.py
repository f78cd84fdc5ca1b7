"""One function per result, each returning a plotly `Figure`.

Nothing is drawn or shown here, and no template or renderer is set for the whole process. Figures show the
numbers of a result as they are: an interval is drawn only where the result has one, and its kind is named in
the hover.
"""

from __future__ import annotations

import math
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._intervals import proportion_interval
from tl_tomsparse._plot_comparison import study_comparison
from tl_tomsparse._plot_components import component_effects
from tl_tomsparse._plot_frequencies import bos_cosines, frequency_norms, mask_by_frequency
from tl_tomsparse._plot_heads import (
    dose_curve,
    head_effects,
    heads_and_mask,
    heads_section,
    knockouts_predicted,
    recovery_path,
)
from tl_tomsparse._plot_sinks import angle_histogram, attention, bos_angles, sinks
from tl_tomsparse._plot_study import study_arms, study_doses, study_localisation, study_overlaps
from tl_tomsparse._plot_style import GREY, finish, legend, step

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tl_tomsparse.effect import Effect
    from tl_tomsparse.experiment import KappaSweep
    from tl_tomsparse.mask import SparseMask

__all__ = [
    "LABELS",
    "accuracy",
    "angle_histogram",
    "attention",
    "bos_angles",
    "bos_cosines",
    "component_effects",
    "dose_curve",
    "frequency_norms",
    "head_effects",
    "heads_and_mask",
    "heads_section",
    "kappa_sweep",
    "knockouts_predicted",
    "mask_by_frequency",
    "mask_places",
    "recovery_path",
    "sinks",
    "study_arms",
    "study_comparison",
    "study_doses",
    "study_localisation",
    "study_overlaps",
]

LABELS = {
    "false_belief": "false belief",
    "true_belief": "true belief",
    "reality": "reality",
    "memory": "memory",
    "second_order": "second order",
    "false_photograph": "false photograph",
    "true_photograph": "true photograph",
    "other": "other",
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
    "false_photograph": "#d35400",
    "true_photograph": "#148f77",
    "other": "#566573",
    "paired": "#17202a",
    "before": "#17202a",
    "mask": "#c0392b",
    "random": "#7f8c8d",
    "general_only": "#2471a3",
    "tom_only": "#b9770e",
}
_PANELS_A_ROW = 4


def kappa_sweep(sweep: KappaSweep, *, chosen: float | None = None) -> go.Figure:
    """Accuracies (above) and perplexity (below) against sparsity, with the band of random masks.

    Kappas are evenly spaced steps, because they span decades and include 0. Lines are the mask's; the grey
    band spans the false-belief accuracies (below: perplexities) of all random masks; dotted is the unedited
    model.

    Args:
        sweep: from `kappa_sweep`.
        chosen: a kappa to mark.

    Raises:
        TomsparseError: `chosen` is not a kappa of the sweep.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    mask = sweep.arm("mask")
    kappas = list(mask.index)
    if chosen is not None and chosen not in kappas:
        raise TomsparseError(f"chosen={chosen!r} is not a kappa of the sweep: {', '.join(map(str, kappas))}.")
    steps = list(range(len(kappas)))
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.66, 0.34], vertical_spacing=0.13)
    for row, measure in ((1, "false_belief"), (2, "perplexity")):
        band = sweep.band(measure)
        figure.add_trace(
            go.Scatter(
                x=steps + steps[::-1],
                y=[*band.high, *band.low[::-1]],
                mode="lines",
                fill="toself",
                fillcolor="rgba(127,140,141,0.25)",
                line={"width": 0},
                hoverinfo="skip",
                name=f"{sweep.meta['n_random']} random masks",
                legend="legend" if row == 1 else "legend2",
            ),
            row=row,
            col=1,
        )
        line = {"dash": "dot", "color": GREY, "width": 1.5}
        figure.add_hline(y=mask[measure].iloc[0], line=line, row=row, col=1)
    for measure in ("paired", "second_order", "memory", "reality", "true_belief", "false_belief"):
        if mask[measure].isna().all():
            continue
        main = measure == "false_belief"
        figure.add_trace(
            go.Scatter(
                x=steps,
                y=mask[measure],
                mode="lines+markers",
                name=LABELS[measure],
                line={"color": _COLOURS[measure], "width": 3 if main else 1.5},
                error_y=_exact_bars(mask[measure], sweep.n[measure]) if main else None,
                customdata=[[kappa, int(n), sweep.n[measure]] for kappa, n in zip(kappas, mask.n_weights)],
                hovertemplate="kappa %{customdata[0]:.3g}, %{customdata[1]} weights<br>"
                f"%{{y:.3f}} of %{{customdata[2]}}<extra>{LABELS[measure]}</extra>",
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
                name=LABELS[arm],
                legend="legend2",
                line={"color": _COLOURS[arm], "dash": dash, "width": 1.5},
                customdata=[[kappa, int(n)] for kappa, n in zip(kappas, rows.n_weights)],
                hovertemplate="kappa %{customdata[0]:.3g}, %{customdata[1]} weights<br>"
                f"perplexity %{{y:.4g}}<extra>{LABELS[arm]}</extra>",
            ),
            row=2,
            col=1,
        )
    if chosen is not None:
        line = {"color": _COLOURS["mask"], "width": 1, "dash": "dash"}
        figure.add_vline(x=kappas.index(chosen), line=line, row="all", col=1)
        side = "left" if kappas.index(chosen) < steps[-1] / 2 else "right"  # towards the middle
        figure.add_annotation(
            x=kappas.index(chosen), y=1.04, text="chosen", showarrow=False, xanchor=side, row=1, col=1
        )
    labels = [f"{_short(kappa)}<br>{int(n)}" for kappa, n in zip(kappas, mask.n_weights)]
    figure.update_xaxes(range=[-0.3, steps[-1] + 0.3], tickvals=steps, ticktext=labels)
    figure.update_xaxes(title="kappa, and below it the number of weights edited", row=2, col=1)
    figure.update_yaxes(title="accuracy (dev stories)", range=[-0.03, 1.07], row=1, col=1)
    values = sweep.frame.perplexity
    ticks = _log_ticks(float(values.min()), float(values.max()))
    figure.update_yaxes(
        title="perplexity", type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks], row=2, col=1
    )
    finish(figure, height=680).update_layout(legend_traceorder="reversed")
    top = figure.layout.yaxis2.domain[1]
    return figure.update_layout(legend2={**legend(), "y": top + 0.01})


def accuracy(effect: Effect) -> go.Figure:
    """Accuracy of each category before and after, beside the controls, with the intervals of the table."""
    import plotly.graph_objects as go

    table = effect.accuracy
    measures = list(dict.fromkeys(table.measure))
    figure = go.Figure()
    arms = list(dict.fromkeys(table.arm))
    for place, arm in enumerate(arms):
        rows = table[table.arm == arm].set_index("measure").loc[measures]
        label = LABELS.get(arm, arm)
        figure.add_trace(
            go.Scatter(
                x=[i + (place - (len(arms) - 1) / 2) * 0.14 for i in range(len(measures))],
                y=rows.accuracy,
                mode="markers",
                name=label if arm == "before" else f"{label} ({effect.n_weights[arm]} weights)",
                marker={
                    "color": _COLOURS.get(arm, "#34495e"),
                    "size": 9,
                    "symbol": "square" if arm == "random" else "circle",
                },
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": rows.high - rows.accuracy,
                    "arrayminus": rows.accuracy - rows.low,
                    "thickness": 1.2,
                },
                customdata=rows[["low", "high", "interval", "n"]].to_numpy(),
                hovertemplate="%{y:.3f}, %{customdata[0]:.3f} to %{customdata[1]:.3f}<br>"
                f"(%{{customdata[2]}}), n = %{{customdata[3]}}<extra>{label}</extra>",
            )
        )
    before = table[table.arm == "before"].set_index("measure")
    for i, measure in enumerate(measures):
        chance = before.chance[measure]
        line = {"dash": "dot", "color": GREY}
        figure.add_shape(type="line", x0=i - 0.42, x1=i + 0.42, y0=chance, y1=chance, line=line)
    names = ["<br>".join(wrap(LABELS[measure], 11)) for measure in measures]
    figure.update_xaxes(tickvals=list(range(len(measures))), ticktext=names)
    figure.update_yaxes(title="accuracy (held-out stories)", range=[-0.03, 1.03])
    return finish(figure, height=470)


def mask_places(mask: SparseMask) -> go.Figure:
    """Where the masked weights lie: entries in each layer and head, and in each layer of the MLP's matrices.

    One range of colours for all heads (the bar is theirs), another one for MLP matrices, which show numbers.

    Raises:
        TomsparseError: an empty mask.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    if not len(mask):
        raise TomsparseError("The mask is empty; there is nothing to show. Choose a larger kappa.")
    panels = _places(mask)
    layers = sorted({layer for layer, _ in mask.shapes})
    names = list(panels)
    n_rows = math.ceil(len(names) / _PANELS_A_ROW)
    n_columns = min(len(names), _PANELS_A_ROW)
    in_column = [names[column::_PANELS_A_ROW] for column in range(n_columns)]
    widths = [max(2, *(len(panels[name][0]) for name in column)) for column in in_column]
    cell = max(12.0, min(34.0, 560 / len(layers)))
    figure = make_subplots(
        rows=n_rows, cols=n_columns, subplot_titles=[f"W_{name}" for name in names], column_widths=widths,
        shared_yaxes=True, horizontal_spacing=0.04,
        vertical_spacing=min(0.3, 90 / (cell * len(layers) * n_rows)),
    )  # fmt: skip
    # A head holds far fewer weights than an MLP matrix, so each kind has its own range of colours.
    tops = dict.fromkeys((True, False), 0)
    for matrix, rows in panels.items():
        kind = _per_head(mask, matrix)
        tops[kind] = max(tops[kind], *(max(row) for row in rows))
    few = len(layers) * sum(widths) <= 400
    for place, (matrix, rows) in enumerate(panels.items()):
        where = {"row": 1 + place // _PANELS_A_ROW, "col": 1 + place % _PANELS_A_ROW}
        per_head = _per_head(mask, matrix)
        top = max(1, tops[per_head])
        head = ("kv head" if matrix in "KV" else "head") if per_head else ""
        figure.add_trace(
            go.Heatmap(
                z=rows,
                x=list(range(len(rows[0]))),
                y=layers,
                zmin=0,
                zmax=top,
                colorscale="Viridis",
                showscale=place == 0,
                colorbar={"title": "weights", "tickformat": "d", "nticks": min(top + 1, 8)},
                texttemplate="%{z}" if few or not per_head else None,
                xgap=1,
                ygap=1,
                hovertemplate=f"layer %{{y}}{', ' + head + ' %{x}' if head else ''}: %{{z}} weights"
                f"<extra>W_{matrix}</extra>",
            ),
            **where,
        )
        figure.update_xaxes(title=head, dtick=step(len(rows[0])), showticklabels=per_head, **where)
    figure.update_yaxes(dtick=step(len(layers)), autorange="reversed")
    figure.update_yaxes(title="layer", col=1)
    return finish(figure, height=round(120 + n_rows * cell * len(layers) + 90 * (n_rows - 1)))


def _places(mask: SparseMask) -> dict[str, list[list[int]]]:
    """For each matrix the number of entries, by layer and head; one column where there are no heads."""
    heads = mask.counts("head")
    layers = sorted({layer for layer, _ in mask.shapes})
    panels: dict[str, list[list[int]]] = {}
    for matrix in dict.fromkeys(name for _, name in mask.shapes):
        rows = []
        for layer in layers:
            shape = mask.shapes.get((layer, matrix))
            if shape is None:
                rows.append([0])
            elif len(shape) == 3:
                rows.append([int(heads[layer, matrix, head]) for head in range(shape[0])])
            else:
                rows.append([len(mask.entries.get((layer, matrix), ()))])
        panels[matrix] = rows
    return panels


def _per_head(mask: SparseMask, matrix: str) -> bool:
    return any(len(shape) == 3 for (_, name), shape in mask.shapes.items() if name == matrix)


def _short(kappa: float) -> str:
    """Three significant digits in as few characters as may be: 0.01, 5.28e-5."""
    text = f"{kappa:.3g}"
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else text


def _log_ticks(low: float, high: float) -> list[float]:
    """A few round numbers on a log axis: 1, 2, 5 times powers of ten, even steps where these are too few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**n for n in decades for m in (1, 2, 5) if low <= m * 10.0**n <= high]
    if len(ticks) > 8:
        ticks = [10.0**n for n in decades if low <= 10.0**n <= high]
    if len(ticks) >= 3:
        return ticks
    rough = max((high - low) / 4, 1e-3 * high)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough)
    return [round(n * step, 10) for n in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _exact_bars(shares: Any, n: int) -> dict[str, Any]:
    bounds = [proportion_interval(round(share * n), n) for share in shares]
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - share for share, (_, high) in zip(shares, bounds)],
        "arrayminus": [share - low for share, (low, _) in zip(shares, bounds)],
        "thickness": 1,
        "width": 3,
    }
