"""The page of a run: one self-contained HTML file, every sentence and figure made from the run's numbers.

What the page says in words is computed: the verdict from the effect's intervals, the rest from counts. Nothing is typed in by hand
for a particular model, so that the page can be trusted where it says that no effect was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_tomsparse import plot
from tl_tomsparse._artifacts import write_text

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from tl_tomsparse.pipeline import RunResult
    from tl_tomsparse.stories import Story

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #17202a; background: #fff; margin: 0 auto; max-width: 980px; padding: 24px; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3em; } h2 { font-size: 1.2rem; margin: 2em 0 .5em; }
p { max-width: 46em; } .lead { font-size: 1.1rem; } .quiet { color: #566573; font-size: .9rem; }
table { border-collapse: collapse; font-size: .92rem; margin: .6em 0; } th, td { padding: .3em .7em; text-align: right; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #17202a; vertical-align: bottom; }
tbody tr { border-bottom: 1px solid #e5e8e8; } td small { color: #566573; display: block; white-space: nowrap; }
.scroll { overflow-x: auto; } .claims td { text-align: left; vertical-align: top; }
.status { display: inline-block; white-space: nowrap; border-radius: 4px; padding: 0 .5em; font-size: .85rem; font-weight: 600; }
.supported { background: #d4efdf; color: #145a32; } .not-supported { background: #fadbd8; color: #78281f; }
.not-testable { background: #e5e8e8; color: #2c3e50; }
.story { border-left: 4px solid #d5d8dc; padding: .2em 1em; margin: 1em 0; } .story table td { text-align: left; }
.wrong { color: #922b21; font-weight: 600; } .right { color: #1d6b3a; } code { font-size: .85em; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15em 1em; font-size: .92rem; } dt { color: #566573; } dd { margin: 0; }
"""
_ARMS = ("before", "mask", "random", "general_only", "tom_only")


def write_report(path: str | Path, result: RunResult) -> None:
    """Write the page of a run, whole or not at all."""
    write_text(path, report_html(result))


def report_html(result: RunResult) -> str:
    """The page of a run as HTML without any outside resource."""
    figures = _Figures()
    name = result.facts["identity"]["name"]
    n = result.effect.n_weights["mask"]
    body = [
        f"<h1>Which few weights do {escape(name)}’s false-belief answers hang on?</h1>",
        f'<p class="lead">{_verdict_in_short(result)}</p>',
        "<h2>Verdict</h2>",
        _claims(result),
        "<h2>What was asked</h2>",
        _question(result),
        _settings(result),
        "<h2>Answers on held-out stories, before and after</h2>",
        _accuracy_table(result),
        figures.add(plot.accuracy(result.effect)),
        "<h2>Perplexity of held-out general text</h2>",
        _perplexity_table(result.effect.perplexity, result.effect.n_weights),
        "<h2>How many weights: the sweep on dev stories</h2>",
        f"<p>{escape(result.choice.reason)} The number was chosen here, on dev stories; nothing was chosen on the held-out ones.</p>",
        figures.add(plot.kappa_sweep(result.sweep, chosen=result.choice.kappa)),
        "<h2>Where the masked weights lie</h2>",
        *((_places(result), figures.add(plot.mask_places(result.masks["mask"]))) if n else ("<p>The mask is empty.</p>",)),
        "<h2>Some stories</h2>",
        _stories(result),
        "<h2>Files, command and versions</h2>",
        _files(result),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(name)}: sparse weights</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


class _Figures:
    """Figures as HTML; the first one brings plotly.js along."""

    def __init__(self) -> None:
        self._first = True

    def add(self, figure: go.Figure) -> str:
        first, self._first = self._first, False
        return str(
            figure.to_html(full_html=False, include_plotlyjs=first, config={"displaylogo": False, "responsive": True})
        )


def _verdict_in_short(result: RunResult) -> str:
    whole = result.claims[0]
    words = {"supported": "Found", "not supported": "Not found", "not testable": "Not testable"}[whole.status]
    return f"<strong>{words}.</strong> {escape(whole.sentence)}"


def _claims(result: RunResult) -> str:
    rows = "".join(
        f"<tr><td>{escape(claim.claim.replace('_', ' '))}</td>"
        f'<td><span class="status {claim.status.replace(" ", "-")}">{claim.status}</span></td><td>{escape(claim.sentence)}</td></tr>'
        for claim in result.claims
    )
    meta = result.effect.meta
    return (
        f'<table class="claims"><tbody>{rows}</tbody></table><p class="quiet">Computed from the intervals below. '
        f"“Stays” means that the whole 95 % interval of the change lies within {100 * meta['accuracy_margin']:g} points "
        f"(perplexity: {100 * meta['perplexity_margin']:g} %). No claim of damage is made where the unedited model is not above chance.</p>"
    )


def _question(result: RunResult) -> str:
    settings, facts = result.settings, result.facts
    text = "generated text" if not settings.text else ", ".join(Path(path).name for path in settings.text)
    n, kappa = result.effect.n_weights["mask"], result.choice.kappa
    chosen = facts["n_weights"]
    return (
        f"<p>The sensitivity of every weight of {escape(', '.join('W_' + m for m in settings.matrices))} "
        f"({chosen:,} weights) was measured on {settings.stories} false-belief stories and on {settings.windows} windows of "
        f"general text ({escape(text)}): the diagonal of the empirical Fisher. The mask is the top share kappa = {kappa:.3g} of each "
        f"matrix for the stories, without the top share for the text: {n} weights, {100 * n / chosen:.3g} % of those examined and "
        f"{100 * n / facts['n_parameters']:.2g} % of the model. For the length of the measurement each masked weight became the mean of "
        f"its matrix’s other weights; then it was put back bit for bit. Random masks have as many weights in each matrix.</p>"
    )


def _settings(result: RunResult) -> str:
    settings, effect = result.settings, result.effect
    entries = {
        "model": f"{result.facts['identity']['name']} ({result.facts['n_parameters']:,} parameters, {settings.backend}, {settings.dtype})",
        "stories": f"{settings.stories} train (sensitivity), {settings.dev_stories} dev (kappa), {settings.test_stories} test (reported)",
        "general text": f"{settings.windows} windows of {settings.length} tokens, {effect.meta['n_text_samples']} held out",
        "controls": f"{settings.random_masks} random masks, the general-only and the ToM-only mask",
        "BOS token": "first in every sample" if settings.prepend_bos else "none",
        "seed": str(settings.seed),
    }
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in entries.items()) + "</dl>"


def _accuracy_table(result: RunResult) -> str:
    table, weights = result.effect.accuracy, result.effect.n_weights
    arms = [arm for arm in _ARMS if arm in set(table.arm)]
    head = "".join(f"<th>{escape(plot.LABELS[arm])}<small>{weights[arm]} weights</small></th>" for arm in arms)
    rows = []
    for measure in dict.fromkeys(table.measure):
        of = table[table.measure == measure].set_index("arm")
        cells = "".join(
            f"<td>{100 * of.accuracy[arm]:.1f} %<small>{100 * of.low[arm]:.1f} to {100 * of.high[arm]:.1f}</small></td>" for arm in arms
        )
        rows.append(
            f"<tr><td>{escape(plot.LABELS[measure])}</td><td>{int(of.n['before'])}</td><td>{100 * of.chance['before']:.0f} %</td>{cells}</tr>"
        )
    return (
        f'<div class="scroll"><table><thead><tr><th></th><th>n</th><th>chance</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        '<p class="quiet">Small print: exact binomial 95 % intervals; for random masks the range over seeds around their mean. '
        "“All agents of a story” counts a story only if the belief of every agent in it is right, where these differ: "
        "an answer that looks at the story but not at the agent fails it.</p>"
    )


def _perplexity_table(table: pd.DataFrame, weights: dict[str, int]) -> str:
    of = table.set_index("arm")
    rows = "".join(
        f"<tr><td>{escape(plot.LABELS[arm])}</td><td>{weights[arm]}</td><td>{of.perplexity[arm]:.4g}</td>"
        f"<td>{of.ratio[arm]:.4f}<small>{of.low[arm]:.4f} to {of.high[arm]:.4f}</small></td></tr>"
        for arm in _ARMS
        if arm in of.index
    )
    return (
        '<table><thead><tr><th></th><th>weights</th><th>perplexity</th><th>ratio to unedited</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _places(result: RunResult) -> str:
    mask = result.masks["mask"]
    by_matrix = mask.counts("matrix")
    layers = mask.counts("layer").sort_values(ascending=False, kind="stable")
    heads = mask.counts("head").sort_values(ascending=False, kind="stable")
    where = ", ".join(f"{count} in W_{name}" for name, count in by_matrix.items())
    words = f"{len(mask)} weights: {where}. Most in layer {layers.index[0]} ({layers.iloc[0]})"
    if len(heads) and heads.iloc[0]:
        layer, matrix, head = heads.index[0]
        words += f"; the fullest head is {matrix} of L{layer}H{head} ({heads.iloc[0]})"
    return f"<p>{escape(words)}.</p>"


def _stories(result: RunResult, n: int = 4) -> str:
    answers = result.effect.answers
    changed = answers[answers.correct_before & ~answers.correct_mask]
    order = list(dict.fromkeys(changed[changed.category == "false_belief"].story_id)) + list(dict.fromkeys(changed.story_id))
    order += [story.id for story in result.stories]
    shown = list(dict.fromkeys(order))[:n]
    by_id = {story.id: story for story in result.stories}
    n_changed = len(changed)
    intro = (
        f"<p>{n_changed} of {len(answers)} answers that were right became wrong under the mask"
        f"{', and stories with such answers come first' if n_changed else '; the first stories of the held-out set'}.</p>"
    )
    return intro + "".join(_story(by_id[name], answers[answers.story_id == name]) for name in shown)


def _story(story: Story, answers: pd.DataFrame) -> str:
    rows = []
    for row in answers.itertuples():
        question = story.questions[int(row.question)]
        cells = "".join(
            f'<td class="{"right" if correct else "wrong"}">{escape(str(chosen))}</td>'
            for chosen, correct in ((row.chosen_before, row.correct_before), (row.chosen_mask, row.correct_mask))
        )
        rows.append(
            f"<tr><td>{escape(question.text)} …</td><td>{escape(plot.LABELS[question.category])}</td><td>{escape(question.answer)}</td>{cells}"
            f"<td>{100 * row.correct_random:.0f} %</td></tr>"
        )
    head = "".join(f"<th>{name}</th>" for name in ("question", "category", "answer", "unedited", "mask", "random right"))
    return (
        f'<div class="story"><p>{escape(story.text)}</p><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div><p class="quiet">{escape(story.id)}, {escape(story.scenario)}, '
        f"{escape(story.condition.replace('_', ' '))} of {escape(story.protagonist)}</p></div>"
    )


def _files(result: RunResult) -> str:
    facts = result.facts
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    identity = facts["identity"]
    entries: Sequence[tuple[str, Any]] = (
        ("command", facts["command"]),
        ("versions", versions),
        ("device", facts["device"]),
        ("weights", f"fingerprint {identity['fingerprint']}, basis {identity['basis']}"),
        ("every number", "results.json; accuracy, random, perplexity, differences, answers, sweep, mask_entries .parquet"),
        ("tensors", "mask.safetensors, mask_general_only.safetensors, mask_tom_only.safetensors, sensitivity_*.safetensors"),
    )
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd><code>{escape(str(v))}</code></dd>" for k, v in entries) + "</dl>"
