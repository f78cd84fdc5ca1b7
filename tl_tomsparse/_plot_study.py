"""Figures of a study; a part of `plot`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._plot_style import GREY

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from tl_tomsparse.study import Study

_RED, _BLUE, _ORANGE, _BLACK = "#c0392b", "#2471a3", "#d68910", "#17202a"
_PANELS = ("false_belief", "true_belief", "perplexity")


def study_arms(study: Study) -> go.Figure:
    """False and true belief and perplexity under every edit: the mask, its controls, random masks, operators.

    Intervals are exact binomial ones for a single edit and extremes over seeds for random ones; dotted lines
    are the unedited model.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    families = [
        family
        for family in dict.fromkeys(study.arms.family)
        if not family.startswith(("dose", "rescue")) and family != "before"
    ][::-1]
    titles = ["false belief", "true belief", "perplexity of text"]
    figure = make_subplots(cols=3, shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.03)
    table = study.accuracy.set_index(["family", "measure"])
    for column, measure in enumerate(_PANELS, start=1):
        values, lows, highs = [], [], []
        for family in families:
            if measure == "perplexity":
                seen = study.arms[study.arms.family == family].perplexity
                value, low, high = np.exp(np.log(seen).mean()), seen.min(), seen.max()
            elif (family, measure) in table.index:
                row = table.loc[(family, measure)]
                value, low, high = row.accuracy, row.low, row.high
            else:
                value = low = high = np.nan
            values.append(value)
            lows.append(low)
            highs.append(high)
        x, low, high = np.array(values), np.array(lows), np.array(highs)
        figure.add_trace(
            go.Scatter(
                x=x,
                y=[label(family) for family in families],
                mode="markers",
                marker={"color": [_colour(family) for family in families], "size": 8},
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": high - x,
                    "arrayminus": x - low,
                    "thickness": 1,
                    "color": GREY,
                },
                customdata=np.stack([low, high], axis=1),
                hovertemplate="%{y}<br>%{x:.3f} (%{customdata[0]:.3f} to %{customdata[1]:.3f})"
                "<extra></extra>",
                showlegend=False,
            ),
            row=1,
            col=column,
        )
        before = study.arms[study.arms.family == "before"].iloc[0]
        if measure in before and np.isfinite(before[measure]):
            figure.add_vline(x=float(before[measure]), line={"dash": "dot", "color": GREY}, row=1, col=column)
    figure.update_xaxes(type="log", row=1, col=3)
    figure.update_xaxes(range=[-0.02, 1.02], row=1, col=1)
    figure.update_xaxes(range=[-0.02, 1.02], row=1, col=2)
    figure.update_layout(
        template="plotly_white",
        height=120 + 22 * len(families),
        margin={"l": 10, "r": 10, "t": 40, "b": 30},
    )
    figure.update_yaxes(automargin=True)
    return figure


def study_doses(study: Study) -> go.Figure:
    """False-belief accuracy by kappa, by what masked weights are multiplied with, and by the share of the
    mask that is left as it is.

    Of random masks the mean and the range over seeds.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    titles = ("more weights", "masked weights times", "part of the mask left as it is")
    figure = make_subplots(cols=3, subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.05)
    names = {
        ("dose", False): "mask",
        ("dose", True): "random masks of equal size",
        ("rescue", False): "most sensitive left first",
        ("rescue", True): "random part left",
    }
    before = float(study.arms.set_index("family").false_belief["before"])
    for column, kind in enumerate(("dose", "operator", "rescue"), start=1):
        for random, colour in ((False, _RED), (True, GREY)):
            curve = _curve(study, kind, random)
            hover = "random" if random else "mask"
            figure.add_trace(
                go.Scatter(
                    x=list(curve.index),
                    y=list(curve["mean"]),
                    name=names.get((kind, random), names["dose", random]),
                    showlegend=(kind, random) in names,
                    mode="lines+markers",
                    line={"color": colour, "dash": "dash" if kind == "rescue" else "solid"},
                    error_y={
                        "type": "data",
                        "symmetric": False,
                        "array": list(curve["max"] - curve["mean"]),
                        "arrayminus": list(curve["mean"] - curve["min"]),
                        "thickness": 1,
                    },
                    hovertemplate=f"{hover}, %{{x:.3g}}: %{{y:.3f}}<extra></extra>",
                ),
                row=1,
                col=column,
            )
        figure.add_hline(y=before, line={"dash": "dot", "color": GREY}, row=1, col=column)
    figure.update_xaxes(type="log", title="kappa", row=1, col=1)
    figure.update_xaxes(title="factor", row=1, col=2)
    figure.update_xaxes(title="share", row=1, col=3)
    figure.update_yaxes(range=[-0.02, 1.05])
    figure.update_yaxes(title="false-belief accuracy", row=1, col=1)
    return _with_legend_below(figure)


def _curve(study: Study, kind: str, random: bool) -> pd.DataFrame:
    """Mean, min and max of false-belief accuracy at each dose, with the arms that end or cross the curve."""
    import pandas as pd

    arms = study.arms
    named = arms.family.str.startswith(f"{kind}_") & (arms.family.str.endswith("_random") == random)
    known = {
        "dose": {study.kappa: "random_matrix" if random else "mask"},
        "operator": {1.0: "before"},
        "rescue": {0.0: "mask", 1.0: "before"},
    }[kind]
    rows = [arms[named & arms.dose.notna()]]
    rows += [arms[arms.family == family].assign(dose=at) for at, family in known.items()]
    curve: pd.DataFrame = pd.concat(rows).groupby("dose").false_belief.agg(["mean", "min", "max"])
    return curve


def study_localisation(study: Study) -> go.Figure:
    """Key-value recall and induction by distance, unedited, under the mask, general text alone, random masks.

    Intervals are exact binomial ones, the band is the range of random masks over seeds around their mean,
    and dotted lines are chance.

    Raises:
        TomsparseError: the study has no such section.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    if study.battery.obstacle is not None:
        raise TomsparseError(f"The study did not measure localisation. {study.battery.obstacle}")
    tasks = {"key_value": "key-value recall", "induction": "induction"}
    figure = make_subplots(
        cols=2, subplot_titles=list(tasks.values()), shared_yaxes=True, horizontal_spacing=0.06
    )
    table = study.battery.scores
    table = table[table.task.isin(tasks)].assign(distance=lambda rows: rows.subset.astype(int))
    lines = {"random_matrix": GREY, "general_only": _BLUE, "mask": _RED, "before": _BLACK}
    for column, task in enumerate(tasks, start=1):
        for family, colour in lines.items():
            rows = table[(table.task == task) & (table.family == family)].groupby("distance")
            several = family == "random_matrix"
            y = rows.score.mean()
            low, high = (rows.score.min(), rows.score.max()) if several else (rows.low.min(), rows.high.max())
            name = {"before": "unedited", "random_matrix": "random masks"}.get(family, label(family))
            if several:
                figure.add_trace(
                    go.Scatter(
                        x=[*y.index, *y.index[::-1]],
                        y=[*high, *low[::-1]],
                        fill="toself",
                        fillcolor="rgba(149, 165, 166, 0.25)",
                        line={"width": 0},
                        hoverinfo="skip",
                        showlegend=False,
                    ),
                    row=1,
                    col=column,
                )
            figure.add_trace(
                go.Scatter(
                    x=list(y.index),
                    y=list(y),
                    name=name,
                    legendgroup=name,
                    showlegend=column == 1,
                    mode="lines+markers",
                    line={"color": colour},
                    error_y=None
                    if several
                    else {
                        "type": "data",
                        "symmetric": False,
                        "array": list(high - y),
                        "arrayminus": list(y - low),
                        "thickness": 1,
                    },
                    customdata=np.stack([low, high], axis=1),
                    hovertemplate=f"{name}, %{{x}} tokens: %{{y:.3f}} (%{{customdata[0]:.3f}} to "
                    "%{customdata[1]:.3f})<extra></extra>",
                ),
                row=1,
                col=column,
            )
        some = table[table.task == task]
        figure.add_hline(y=float(some.chance.iloc[0]), line={"dash": "dot", "color": GREY}, row=1, col=column)
        ticks = sorted(some.distance.unique())
        figure.update_xaxes(type="log", tickvals=ticks, title="distance, tokens", row=1, col=column)
    figure.update_yaxes(range=[-0.02, 1.05])
    figure.update_yaxes(title="accuracy", row=1, col=1)
    return _with_legend_below(figure)


def study_overlaps(study: Study) -> go.Figure:
    """What the mask has in common with other masks, and masks of disjoint stories with each other."""
    import plotly.graph_objects as go

    table = study.overlaps
    names = [
        f"{row.share:g} of the stories, twice" if row.a == "part" else label(row.b)
        for row in table.itertuples()
    ]
    figure = go.Figure(
        [
            go.Bar(
                y=names[::-1],
                x=table.jaccard[::-1],
                orientation="h",
                name="found",
                marker={"color": _BLUE},
                customdata=table[["common", "size_a", "size_b", "p"]][::-1].to_numpy(),
                hovertemplate="%{y}<br>Jaccard %{x:.3f}: %{customdata[0]} in common of %{customdata[1]} and "
                "%{customdata[2]}<br>p %{customdata[3]:.2g}<extra></extra>",
            ),
            go.Scatter(
                y=names[::-1],
                x=table.expected_jaccard[::-1],
                mode="markers",
                name="by chance",
                marker={"color": _ORANGE, "symbol": "line-ns-open", "size": 14, "line": {"width": 2}},
                hovertemplate="by chance %{x:.3f}<extra></extra>",
            ),
        ]
    )
    figure.update_xaxes(title="Jaccard", rangemode="tozero")
    figure.update_yaxes(automargin=True)
    figure.update_layout(
        template="plotly_white",
        height=120 + 22 * len(names),
        margin={"l": 10, "r": 10, "t": 20, "b": 30},
        legend={"orientation": "h", "y": 1.08},
    )
    return figure


def label(family: str) -> str:
    """What a family of arms is called in figures and tables."""
    words = {
        "mask": "the mask",
        "general_only": "general text alone",
        "tom_only": "the task, general text left in",
        "other_stories": "other stories",
        "new_wording": "other wordings",
        "transfer": "transfer stories alone",
        "contents": "contents stories alone",
        "last_token": "last token of the prompt",
        "random_matrix": "random: matrix",
        "operator_flip": "operator: sign flip",
        "operator_half": "operator: times 0.5",
        "operator_amplify": "operator: times 1.5",
        "operator_double": "operator: times 2",
        "tuned": "trained",
        "tuned_random": "trained, random weights",
    }
    if family in words:
        return words[family]
    for prefix in ("random", "operator"):
        if family.startswith(f"{prefix}_"):
            rest = family.removeprefix(f"{prefix}_")
            base = rest.removesuffix("_random")
            inner = words.get(f"{prefix}_{base}", f"{prefix}: {base}")
            return f"{inner}, random weights" if base != rest else inner
    return family.replace("_", " ")


def _with_legend_below(figure: go.Figure) -> go.Figure:
    return figure.update_layout(
        template="plotly_white",
        height=380,
        margin={"l": 10, "r": 10, "t": 40, "b": 30},
        legend={"orientation": "h", "y": -0.25},
    )


def _colour(family: str) -> str:
    if family in ("mask", "tom_only"):
        return _RED
    if family.endswith("_random") or family.startswith("random"):
        return GREY
    return _ORANGE if family.startswith(("operator", "tuned")) else _BLUE
