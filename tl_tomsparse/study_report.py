"""The page of a study: one self-contained HTML file, every sentence and figure made from its numbers."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from tl_tomsparse import plot
from tl_tomsparse._artifacts import write_text
from tl_tomsparse._plot_study import label
from tl_tomsparse._report_parts import Figures, claims_table, html_page, html_table, status_badge

if TYPE_CHECKING:
    import pandas as pd

    from tl_tomsparse._study_claims import StudyClaim
    from tl_tomsparse.study import Study

_WIDE = 720  # pixels in which figures of three panels can be read


def write_study_page(path: str | Path, study: Study) -> None:
    """Write the page of a study, whole or not at all."""
    write_text(path, study_html(study))


def study_html(study: Study) -> str:
    """The page of a study as HTML without any outside resource."""
    figures = Figures()
    facts = study.facts
    name = escape(facts["identity"]["name"])
    body = [
        f"<h1>What {name}’s false-belief answers hang on: the study</h1>",
        _in_short(study),
        "<h2>Claims</h2>",
        _claims(study.claims),
        '<p class="quiet">Estimates are differences of false-belief accuracy unless the sentence says '
        "otherwise. All claims that can be tested are one family with Holm-adjusted p-values at 0.05; "
        f"intervals are 95 % and draw {facts['n_groups']} groups of stories again. The paper is "
        "arXiv 2504.04238.</p>",
        "<h2>Every edit</h2>",
        f"<p>{facts['n_arms']} edits of one model on {facts['n_questions']} held-out questions. The "
        "mask in red, with and without what general text shares, masks of other tasks, labels and stories in "
        "blue, random masks in grey (range over "
        "seeds), other operators on the mask and trained weights in orange.</p>",
        figures.add(plot.study_arms(study), width=_WIDE),
        "<h2>Dose, factor and rescue</h2>",
        figures.add(plot.study_doses(study), width=_WIDE),
        "<h2>What masks have in common</h2>",
        "<p>The mask with the other masks at the same kappa, and masks from disjoint parts of the stories "
        "with each other; by chance: random masks with as many entries in each matrix.</p>",
        figures.add(plot.study_overlaps(study)),
        "<h2>Predicted and true change of the loss</h2>",
        "<p>Mean over held-out false-belief answers, nats, with 95 % intervals over samples. The diagonal is "
        "what a choice of weights by sensitivity counts on.</p>",
        _losses(study),
        "<h2>Whole heads</h2>",
        *_heads(study, figures),
        "<h2>Finding things again, and two kinds of text</h2>",
        *_battery(study, figures),
        "<h2>What this many stories can show</h2>",
        f"<p>{escape(power(study))}</p>",
        "<h2>Settings and versions</h2>",
        _facts(study),
    ]
    return html_page(f"{facts['identity']['name']}: study", body)


def power(study: Study) -> str:
    """The difference of false-belief accuracy that shows in four of five studies with intervals this wide."""
    from scipy.stats import norm

    # Half an interval is what shows in half of them; a normal estimate is beyond it in 80 % at so much more.
    factor = 1 + norm.ppf(0.8) / norm.ppf(0.975)
    rows = study.comparisons.set_index(["family", "measure"])
    widths = {
        family: (row.high - row.low) / 2
        for family, row in rows[rows.index.get_level_values(1) == "false_belief"].droplevel(1).iterrows()
        if family in ("before", "random_matrix")
    }
    parts = [
        f"against {'the unedited model' if family == 'before' else 'random masks'} about "
        f"{100 * factor * width:.1f} points"
        for family, width in widths.items()
    ]
    questions = study.answers.questions
    asked = questions[questions.category == "false_belief"]
    return (
        f"With {len(asked)} false-belief questions in {asked.story_id.nunique()} stories "
        f"({asked.group.nunique()} groups), a difference of false-belief accuracy shows in four of five "
        f"studies if it is {' and '.join(parts)} ({factor:.2f} times half the width of the interval found), "
        "before any adjustment for the number of claims. What is smaller than that is not excluded by “not "
        "supported”."
    )


def _in_short(study: Study) -> str:
    counts = study.to_frame().status.value_counts()
    found = ", ".join(f"{n} {status}" for status, n in counts.items())
    return (
        f'<p class="lead">{len(study.masks["mask"])} weights (kappa {study.kappa:g}); '
        f"{len(study.claims)} claims: {escape(found)}.</p>"
        f"<p>{escape(study.facts['kappa_reason'])}</p>"
    )


def _claims(claims: list[StudyClaim]) -> str:
    rows = []
    for claim in claims:
        interval = ""
        if claim.value == claim.value:
            interval = f"{claim.value:+.3f}"
            if claim.low == claim.low:
                interval += f"<small>{claim.low:+.3f} to {claim.high:+.3f}</small>"
        rows.append(
            f"<tr><td>{escape(claim.claim.replace('_', ' '))}</td>"
            f"<td>{status_badge(claim.status)}</td>"
            f"<td>{interval}</td><td>{escape(claim.sentence)}"
            f'<div class="quiet">The paper: {escape(claim.paper)}.</div></td></tr>'
        )
    head = "<tr><th>claim</th><th>verdict</th><th>estimate</th><th>evidence</th></tr>"
    return (
        f'<div class="scroll"><table class="claims"><thead>{head}</thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _heads(study: Study, figures: Figures) -> list[str]:
    heads = study.heads
    if heads.obstacle is not None:
        return [f"<p>{escape(heads.obstacle)}</p>"]
    n = study.facts["settings"]["head_stories"]
    body = [
        "<p>Which attention heads the answers about beliefs hang on, from knock-outs of several random heads "
        f"at a time (arXiv 2603.03335): found on {n} dev stories, measured on {n} held-out ones. These "
        "claims are not of the family above; each is judged at 0.05 by itself.</p>",
        claims_table(heads.claims),
    ]
    for title, figure in heads.figures.items():
        body += [f"<h3>{escape(title[:1].upper() + title[1:])}</h3>", figures.add(figure, width=_WIDE)]
    return body


def _battery(study: Study, figures: Figures) -> list[str]:
    section = study.battery
    if section.obstacle is not None:
        return [f"<p>{escape(section.obstacle)}</p>"]
    n = study.facts["settings"]["localisation_items"]
    return [
        f"<p>Recall of a fact and going on with a row of words that begins again, {n} items at each distance "
        "in tokens, with four options each; and the perplexity of prose (descriptions, facts) and patterns "
        "(counting, look-ups, repetitions).</p>",
        _claims(section.claims),
        '<p class="quiet">A Holm-adjusted family of their own. Estimates are changes of accuracy over all '
        "distances together, and ratios of perplexities; intervals are 95 % and draw items that share their "
        "facts, or windows of text, again together.</p>",
        figures.add(plot.study_localisation(study), width=_WIDE),
        _localisation(section.scores),
    ]


def _localisation(scores: pd.DataFrame) -> str:
    """Accuracy over all distances and perplexity by arm; of random masks the mean and the range."""
    names = {"key_value": "key-value recall", "induction": "induction"}
    scores = scores.assign(column=scores.task.map(names).fillna("perplexity of " + scores.subset))
    # Every distance has as many items.
    arms = scores.fillna({"seed": -1}).groupby(["family", "seed", "column"], sort=False)
    table = arms[["score", "low", "high"]].mean().reset_index()
    columns = list(table.column.unique())
    rows = []
    for family, some in table.groupby("family", sort=False):
        cells = ""
        for column in columns:
            found = some[some.column == column]
            note = ""
            if len(found) > 1:
                note = f"range {found.score.min():.4g} to {found.score.max():.4g}"
            elif column.startswith("perplexity"):
                note = f"95 % {found.low.item():.4g} to {found.high.item():.4g}"
            cells += f"<td>{found.score.mean():.4g}<small>{note}</small></td>"
        rows.append(f"<tr><td>{escape(label(str(family)))}</td>{cells}</tr>")
    return html_table("<th>edit</th>" + "".join(f"<th>{escape(column)}</th>" for column in columns), rows)


def _losses(study: Study) -> str:
    table = study.losses.groupby(["edit", "term"], sort=False).agg(
        {"mean": "mean", "low": "mean", "high": "mean", "seed": "size"}
    )
    rows = []
    for (edit, term), row in table.iterrows():
        interval = f"{row.low:+.4f} to {row.high:+.4f}" if row.low == row.low else ""
        several = f" (mean of {int(row.seed)})" if row.seed > 1 else ""
        rows.append(
            f"<tr><td>{escape(label(str(edit)))}{several}</td><td>{escape(str(term).replace('_', ' '))}</td>"
            f"<td>{row['mean']:+.4f}</td><td>{interval}</td></tr>"
        )
    head = "<th>edit</th><th>change</th><th>nats</th><th>95 % interval</th>"
    return html_table(head, rows)


def _facts(study: Study) -> str:
    facts = study.facts
    shown = {
        "weights": f"fingerprint {facts['identity']['fingerprint']}",
        "versions": ", ".join(f"{name} {number}" for name, number in facts["versions"].items()),
        "settings": ", ".join(f"{name} {value}" for name, value in facts["settings"].items()),
        "masks": ", ".join(f"{label(name)} {len(mask)}" for name, mask in study.masks.items()),
    }
    return "<dl>" + "".join(f"<dt>{k}</dt><dd>{escape(str(v))}</dd>" for k, v in shown.items()) + "</dl>"
