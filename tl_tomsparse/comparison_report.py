"""The page of several studies side by side: one self-contained HTML file, made from its numbers."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_tomsparse import plot
from tl_tomsparse._artifacts import write_text
from tl_tomsparse._report_parts import Figures, claims_table, html_page, html_table, status_badge

if TYPE_CHECKING:
    import pandas as pd

    from tl_tomsparse.comparison import StudyComparison

_WIDE = 720  # pixels in which a figure of two panels can be read
_NAMES = {"paired": "all agents of a story", "perplexity": "loss of text (nats a token)"}


def write_comparison_page(path: str | Path, found: StudyComparison) -> None:
    """Write the page of a comparison, whole or not at all."""
    write_text(path, comparison_html(found))


def comparison_html(found: StudyComparison) -> str:
    """The page of a comparison as HTML without any outside resource."""
    figures = Figures()
    names = list(found.models.model)
    title = f"{names[0]} beside {', '.join(names[1:])}"
    body = [
        f"<h1>Is it particular to {escape(names[0])}?</h1>",
        f'<p class="lead">{_in_short(found)}</p>',
        "<h2>Particular to this model</h2>",
        claims_table(found.claims),
        '<p class="quiet">Falls of false-belief accuracy beyond those under random masks of equal size. One '
        "family with Holm-adjusted p-values at 0.05; intervals are 95 % and draw groups of stories again, "
        "for both models together where they were asked the same questions, and random masks for each by "
        "itself. A supported claim is about these models: each is one training, they may differ in more than "
        "one thing, and the same share of weights is not the same blow to each; see the loss of text.</p>",
        "<h2>The models</h2>",
        _models(found),
        "<h2>Changes in each model</h2>",
        "<p>Points with 95 % intervals; in grey the range over random masks.</p>",
        figures.add(plot.study_comparison(found), width=_WIDE),
        _changes(found),
        f"<h2>Differences from {escape(names[0])}</h2>",
        f"<p>The change in {escape(names[0])} minus that in the other model: below zero where it falls more "
        "here. Nothing is adjusted for the number of rows.</p>",
        _differences(found),
        "<h2>Every claim of every study</h2>",
        _by_model(found.statuses, "claim", status_badge),
        *_settings(found.settings),
    ]
    return html_page(title, body)


def _in_short(found: StudyComparison) -> str:
    names = {
        "supported": "is",
        "not supported": "is not shown to be",
        "not testable": "cannot be tested to be",
    }
    parts = [f"{names[claim.status]} larger than in {claim.other}" for claim in found.claims]
    fall = f"In {found.models.model[0]}, the fall of false belief beyond random masks"
    return escape(f"{fall} {', '.join(parts)}.")


def _models(found: StudyComparison) -> str:
    head = (
        "<th>model</th><th>weights</th><th>kappa</th><th>masked</th><th>matrices</th><th>tracks beliefs</th>"
        "<th>false belief, unedited</th><th>mask</th><th>random masks</th>"
    )
    rows = [
        f"<tr><td>{escape(row.model)}</td><td>{escape(row.name)}"
        f"<small><code>{escape(row.fingerprint[:12])}</code></small></td><td>{row.kappa:g}</td>"
        f"<td>{row.n_weights}</td><td>{escape(row.matrices)}</td><td>{status_badge(row.tracks_beliefs)}</td>"
        f"<td>{row.before:.3f}</td><td>{row.mask:.3f}</td><td>{row.random:.3f}</td></tr>"
        for row in found.models.itertuples(index=False)
    ]
    return html_table(head, rows)


def _changes(found: StudyComparison) -> str:
    """A row a measure, a column a model and what it is compared with."""
    frame, models = found.frame[found.frame.minus.isna()], list(found.models.model)
    head = "".join(f"<th>{escape(model)}</th><th>beyond random</th>" for model in models)
    return _by_measure(frame, head, [("model", model) for model in models])


def _differences(found: StudyComparison) -> str:
    frame = found.frame[found.frame.minus.notna()]
    others = [claim.other for claim in found.claims]
    head = "".join(f"<th>minus {escape(other)}</th><th>beyond random</th>" for other in others)
    unpaired = sorted({f"{row.measure} ({row.minus})" for row in frame.itertuples() if not row.paired})
    note = ""
    if unpaired:
        asked = ", ".join(map(_name, unpaired))
        note = f'<p class="quiet">Not paired, since questions or texts differ: {escape(asked)}.</p>'
    return _by_measure(frame, head, [("minus", other) for other in others]) + note


def _by_measure(frame: pd.DataFrame, head: str, columns: list[tuple[str, str]]) -> str:
    rows = []
    for measure in dict.fromkeys(frame.measure):
        cells = []
        for column, value in columns:
            for against in ("before", "random"):
                chosen = frame[
                    (frame.measure == measure) & (frame[column] == value) & (frame.against == against)
                ]
                cells.append(_cell(chosen.iloc[0]) if len(chosen) else "<td></td>")
        rows.append(f"<tr><td>{escape(_name(measure))}</td>{''.join(cells)}</tr>")
    return html_table(f"<th>change</th>{head}", rows)


def _cell(row: Any) -> str:
    return f"<td>{row.value:+.3f}<small>{row.low:+.3f} to {row.high:+.3f}</small></td>"


def _settings(settings: pd.DataFrame) -> list[str]:
    """What was asked for differently."""
    if not len(settings):
        return ['<p class="quiet">All studies were asked for with the same settings.</p>']
    return ["<h2>Settings that differ</h2>", _by_model(settings, "setting", escape)]


def _by_model(table: pd.DataFrame, what: str, cell: Callable[[str], str]) -> str:
    """A table with a column for each model."""
    head = "".join(f"<th>{escape(name)}</th>" for name in (what, *table.columns))
    rows = []
    for name, values in zip(table.index, table.to_numpy()):
        cells = "".join(f"<td>{cell(value)}</td>" for value in values)
        rows.append(f"<tr><td>{escape(name.replace('_', ' '))}</td>{cells}</tr>")
    return html_table(head, rows)


def _name(measure: str) -> str:
    return _NAMES.get(measure, measure.replace("_", " "))
