"""The page of a run: one self-contained HTML file, every sentence and figure made from the run's numbers.

What the page says in words is computed: the verdict from the effect's intervals, the rest from counts.
Nothing is typed in by hand for a particular model, so that the page can be trusted where it says that no
effect was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from tl_tomsparse import plot
from tl_tomsparse._artifacts import write_text
from tl_tomsparse._report_parts import Figures, claims_table, html_page, html_table
from tl_tomsparse._report_position import position_section

if TYPE_CHECKING:
    import pandas as pd

    from tl_tomsparse.mask import SparseMask
    from tl_tomsparse.pipeline import RunResult
    from tl_tomsparse.stories import Story
    from tl_tomsparse.verdict import Claim

_ARMS = ("before", "mask", "random", "general_only", "tom_only")
_IN_SHORT = {"supported": "Found.", "not supported": "Not found.", "not testable": "Not testable."}


def write_report(path: str | Path, result: RunResult) -> None:
    """Write the page of a run, whole or not at all."""
    write_text(path, report_html(result))


def report_html(result: RunResult) -> str:
    """The page of a run as HTML without any outside resource."""
    figures = Figures()
    name = result.facts["identity"]["name"]
    mask = result.masks["mask"]
    chosen = f"{escape(result.choice.reason)} Chosen on dev stories; nothing was chosen on held-out ones."
    body = [
        f"<h1>Which few weights do {escape(name)}’s false-belief answers hang on?</h1>",
        _verdict_in_short(result.claims[0]),
        "<h2>Verdict</h2>",
        claims_table(result.claims[1:]),
        _how_decided(result),
        "<h2>What was asked</h2>",
        _question(result),
        _settings(result),
        "<h2>Answers on held-out stories, before and after</h2>",
        _accuracy_table(result),
        figures.add(plot.accuracy(result.effect)),
        "<h2>Perplexity of held-out general text</h2>",
        _perplexity_table(result.effect.perplexity, result.effect.n_weights),
        "<h2>How many weights: the sweep on dev stories</h2>",
        f"<p>{chosen}</p>",
        figures.add(plot.kappa_sweep(result.sweep, chosen=result.choice.kappa)),
        "<h2>Where the masked weights lie</h2>",
        _places(mask),
        figures.add(plot.mask_places(mask), width=_width(mask)) if len(mask) else "",
        "<h2>Position: rotary frequencies and the attention sink</h2>",
        *position_section(result, figures),
        "<h2>Some stories</h2>",
        _stories(result),
        "<h2>Files, command and versions</h2>",
        _files(result),
    ]
    return html_page(f"{name}: sparse weights", body)


def _width(mask: SparseMask) -> int:
    """Pixels in which a figure of a mask's places can be read."""
    heads = {name: shape[0] if len(shape) == 3 else 2 for (_, name), shape in mask.shapes.items()}
    return 100 + 14 * sum(sorted(heads.values())[-4:])


def _verdict_in_short(whole: Claim) -> str:
    return f'<p class="lead"><strong>{_IN_SHORT[whole.status]}</strong> {escape(whole.sentence)}</p>'


def _how_decided(result: RunResult) -> str:
    meta = result.effect.meta
    return (
        '<p class="quiet">Computed from the intervals below. '
        "“Stays” means that the whole 95 % interval of the change lies within "
        f"{100 * meta['accuracy_margin']:g} points (perplexity: {100 * meta['perplexity_margin']:g} %). "
        "No claim of damage is made where the unedited model is not above chance.</p>"
    )


def _question(result: RunResult) -> str:
    settings, facts = result.settings, result.facts
    text = ", ".join(Path(path).name for path in settings.text) or "generated text"
    n, examined = result.effect.n_weights["mask"], facts["n_weights"]
    matrices = ", ".join(f"W_{name}" for name in settings.matrices)
    return (
        f"<p>The sensitivity of every weight of {escape(matrices)} ({examined:,} weights) was measured on "
        f"{settings.stories} false-belief stories and on {settings.windows} windows of general text "
        f"({escape(text)}): the diagonal of the empirical Fisher. The mask is the top share "
        f"kappa = {result.choice.kappa:.3g} of each matrix for the stories, without the top share for "
        f"the text: {n} weights, {100 * n / examined:.3g} % of those examined and "
        f"{100 * n / facts['n_all_weights']:.2g} % of all in attention and MLPs. For the length of the "
        "measurement each masked weight became the mean of its matrix’s other weights; then it was put back "
        "bit for bit. Random masks have as many weights in each matrix.</p>"
    )


def _settings(result: RunResult) -> str:
    settings, meta = result.settings, result.effect.meta
    name, n_weights = result.facts["identity"]["name"], result.facts["n_all_weights"]
    entries = {
        "model": f"{name} ({n_weights:,} weights in attention and MLPs, {settings.backend}, "
        f"{settings.dtype})",
        "stories": f"{settings.stories} train (sensitivity), {settings.dev_stories} dev (kappa), "
        f"{settings.test_stories} test (reported)",
        "general text": f"{settings.windows} windows of {settings.length} tokens (sensitivity), "
        f"{meta['n_text_samples']} held out (perplexity)",
        "controls": f"{settings.random_masks} random masks (sweep: {settings.sweep_masks}), the general-only "
        "and the ToM-only mask",
        "position": f"{result.position.meta['n_samples']} held-out stories",
        "BOS token": f"{result.facts['bos_token']}, first in every sample"
        if settings.prepend_bos
        else "none",
        "seed": str(settings.seed),
    }
    return _list(entries)


def _accuracy_table(result: RunResult) -> str:
    table, weights = result.effect.accuracy, result.effect.n_weights
    arms = [arm for arm in _ARMS if arm in set(table.arm)]
    head = "".join(
        f"<th>{escape(plot.LABELS[arm])}<small>{weights[arm]} weights</small></th>" for arm in arms
    )
    rows = []
    for measure in dict.fromkeys(table.measure):
        of = table[table.measure == measure].set_index("arm")
        cells = "".join(
            f"<td>{100 * of.accuracy[arm]:.1f} %"
            f"<small>{100 * of.low[arm]:.1f} to {100 * of.high[arm]:.1f}</small></td>"
            for arm in arms
        )
        about = f"<td>{int(of.n['before'])}</td><td>{100 * of.chance['before']:.0f} %</td>"
        rows.append(f"<tr><td>{escape(plot.LABELS[measure])}</td>{about}{cells}</tr>")
    return (
        f"{html_table(f'<th></th><th>n</th><th>chance</th>{head}', rows)}"
        '<p class="quiet">Intervals are exact binomial ones of 95 %; for random masks the mean over seeds '
        "and the range. “All agents of a story” counts a story only if the belief of every agent in it is "
        "right, where these differ: an answer that looks at the story but not at the agent fails it.</p>"
    )


def _perplexity_table(table: pd.DataFrame, weights: dict[str, int]) -> str:
    of = table.set_index("arm")
    rows = [
        f"<tr><td>{escape(plot.LABELS[arm])}</td><td>{weights[arm]}</td><td>{of.perplexity[arm]:.4g}</td>"
        f"<td>{of.ratio[arm]:.4f}<small>{of.low[arm]:.4f} to {of.high[arm]:.4f}</small></td></tr>"
        for arm in _ARMS
        if arm in of.index
    ]
    return html_table("<th></th><th>weights</th><th>perplexity</th><th>ratio to unedited</th>", rows)


def _places(mask: SparseMask) -> str:
    if not len(mask):
        return "<p>The mask is empty.</p>"
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
    order = list(dict.fromkeys(changed[changed.category == "false_belief"].story_id)) + list(
        dict.fromkeys(changed.story_id)
    )
    order += [story.id for story in result.stories]
    shown = list(dict.fromkeys(order))[:n]
    by_id = {story.id: story for story in result.stories}
    n_changed = len(changed)
    order_of = "stories with such answers come first" if n_changed else "these are the first held-out stories"
    changes = f"{n_changed} of {len(answers)} answers were right and became wrong under the mask"
    return f"<p>{changes}; {order_of}.</p>" + "".join(
        _story(by_id[name], answers[answers.story_id == name]) for name in shown
    )


def _story(story: Story, answers: pd.DataFrame) -> str:
    rows = []
    for row in answers.itertuples():
        question = story.questions[int(row.question)]
        cells = "".join(
            f'<td class="{"right" if correct else "wrong"}">{escape(str(chosen))}</td>'
            for chosen, correct in (
                (row.chosen_before, row.correct_before),
                (row.chosen_mask, row.correct_mask),
            )
        )
        rows.append(
            f"<tr><td>{escape(question.text)} …</td><td>{escape(plot.LABELS[question.category])}</td>"
            f"<td>{escape(question.answer)}</td>{cells}<td>{100 * row.correct_random:.0f} %</td></tr>"
        )
    names = ("question", "category", "right answer", "unedited", "mask", "right under<br>random masks")
    head = "".join(f"<th>{name}</th>" for name in names)
    about = f"{story.id}, {story.scenario}, {story.condition.replace('_', ' ')} of {story.protagonist}"
    return (
        f'<div class="story"><p>{escape(story.text)}</p>{html_table(head, rows)}'
        f'<p class="quiet">{escape(about)}</p></div>'
    )


def _files(result: RunResult) -> str:
    facts = result.facts
    identity = facts["identity"]
    starts = len(facts["earlier_starts"])
    entries = {
        "command": facts["command"],
        "versions": ", ".join(f"{name} {number}" for name, number in facts["versions"].items()),
        "device": facts["device"],
        "weights": f"fingerprint {identity['fingerprint']}, basis {identity['basis']}",
        "every number": "results.json; accuracy, random, perplexity, differences, answers, choice, sweep, "
        "mask_entries, position*"
        " .parquet",
        "tensors": "mask, mask_general_only, mask_tom_only, sensitivity_tom, sensitivity_general "
        ".safetensors",
    }
    if starts:
        entries["begun"] = (
            f"in {starts} earlier starts by another command or other versions: see results.json"
        )
    return _list(entries, code=True)


def _list(entries: Mapping[str, str], *, code: bool = False) -> str:
    rows = [
        f"<dt>{escape(name)}</dt><dd>{f'<code>{escape(value)}</code>' if code else escape(value)}</dd>"
        for name, value in entries.items()
    ]
    return f"<dl>{''.join(rows)}</dl>"
