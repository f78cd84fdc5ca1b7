"""The page says what the numbers say, and needs nothing but itself."""

from __future__ import annotations

import dataclasses
import re
import shutil
from html import unescape
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests import tiny
from tests.test_effect import Planted
from tl_tomsparse.pipeline import RunResult, RunSettings, run_pipeline
from tl_tomsparse.report import report_html, write_report
from tl_tomsparse.verdict import verdict

NAME = "a<b>&c"


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> RunResult:
    folder = tmp_path_factory.mktemp("page")
    model = shutil.copytree(tiny.long_directory(), folder / NAME)
    settings = RunSettings(
        model=str(model), stories=4, dev_stories=4, test_stories=12, windows=20, length=16,
        kappas=(0.002, 0.02), random_masks=19, device="cpu",
    )  # fmt: skip
    return run_pipeline(
        settings, folder / "run", command="tomsparse run --model '<here>'", show_progress=False
    )


class Page(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def words(result: RunResult) -> str:
    return Page(report_html(result)).text


def rated(result: RunResult, before: dict, mask: dict, random: dict) -> RunResult:
    """The result as if measured on 200 questions of each category with these accuracies."""
    effect = Planted().effect(before, mask, random)
    effect = dataclasses.replace(effect, answers=result.effect.answers)
    return dataclasses.replace(result, effect=effect, claims=verdict(effect))


def test_the_page_needs_nothing_but_itself(result):
    page = Page(report_html(result))
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base")
        assert "src" not in attributes, (tag, attributes)
        assert "href" not in attributes
    scripts = sum(tag == "script" for tag, _ in page.tags)
    assert scripts >= 4
    style = re.search(r"<style>(.*?)</style>", report_html(result), re.DOTALL)
    assert "url(" not in style.group(1)
    assert "@import" not in style.group(1)


def test_names_are_escaped(result):
    html = report_html(result)
    head = html[: html.index("<script")]
    assert "a&lt;b&gt;&amp;c" in head
    assert "<b>" not in html.replace("</b>", "<b>").split("<script")[0]
    assert f"<title>{NAME}" not in html
    assert NAME in unescape(head)
    assert "&lt;here&gt;" in html


def test_the_page_is_the_same_every_time(result, tmp_path):
    write_report(tmp_path / "page.html", result)
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == report_html(result)


def test_every_claim_and_its_status_are_shown(result):
    text = words(result)
    for claim in (*result.claims, *result.position_claims):
        assert claim.sentence in text
        assert claim.status in text


def test_an_untestable_model_is_said_to_be_so_once_at_length(result):
    unable = rated(result, {"false_belief": 0.3}, {"false_belief": 0.1}, {"false_belief": 0.3})
    text = words(unable)
    assert "Not testable. The unedited model does not show that it tracks what each agent believes" in text
    assert text[: text.index("Position: ")].count("95 % interval") <= 8
    by_name = {claim.claim: claim for claim in unable.claims}
    assert "accuracy" not in by_name["false_belief_falls"].sentence


def test_no_effect_is_said_in_words(result):
    text = words(rated(result, {}, {}, {}))
    assert "Not found. The edit of 40 weights has no selective effect that shows. No effect found" in text


def test_an_effect_is_said_in_words_and_numbers_change_words(result):
    found = words(rated(result, {}, {"false_belief": 0.4}, {}))
    assert "Found. The edit of 40 weights lowers false-belief accuracy while" in found
    assert found != words(rated(result, {}, {"false_belief": 0.6}, {}))
    unselective = words(rated(result, {}, {"false_belief": 0.4, "reality": 0.6}, {}))
    assert "Not found. The edit of 40 weights lowers false-belief accuracy, but not shown is: " in unselective


def test_tables_show_the_numbers_of_the_frames(result):
    text = words(result)
    table = result.effect.accuracy
    for row in table.itertuples():
        assert f"{100 * row.accuracy:.1f} %" in text
        assert f"{100 * row.low:.1f} to {100 * row.high:.1f}" in text
    for row in result.effect.perplexity.itertuples():
        assert f"{row.perplexity:.4g}" in text
        assert f"{row.low:.4f} to {row.high:.4f}" in text
    shifted = table.assign(accuracy=table.accuracy * 0 + 0.123456)
    changed = dataclasses.replace(result, effect=dataclasses.replace(result.effect, accuracy=shifted))
    assert words(changed).count("12.3 %") >= len(table)


def test_what_was_asked_is_what_was_done(result):
    text = words(result)
    n, examined = len(result.masks["mask"]), result.facts["n_weights"]
    assert f"W_Q, W_K ({examined:,} weights)" in text
    assert f"{n} weights, {100 * n / examined:.3g} % of those examined" in text
    assert "4 train (sensitivity), 4 dev (kappa), 12 test (reported)" in text
    assert "<bos>, first in every sample" in text
    assert result.choice.reason in text
    for name, number in result.facts["versions"].items():
        assert f"{name} {number}" in text
    assert result.facts["command"] in text
    heads = result.masks["mask"].counts("head")
    layer, matrix, head = heads.idxmax()
    assert f"the fullest head is {matrix} of L{layer}H{head} ({heads.max()})" in text


def test_changed_stories_come_first_with_their_answers(result):
    answers = result.effect.answers.copy()
    answers["correct_before"], answers["correct_mask"] = True, True
    answers["chosen_before"] = answers["chosen_mask"] = answers.answer
    last = result.stories[-1]
    row = answers.index[answers.story_id == last.id][0]
    answers.loc[row, ["correct_mask", "chosen_mask"]] = [False, "changed & <wrong>"]
    found = dataclasses.replace(result, effect=dataclasses.replace(result.effect, answers=answers))
    text = words(found)
    assert (
        f"1 of {len(answers)} answers were right and became wrong under the mask; stories with such" in text
    )
    assert text.index(last.text) < text.index(result.stories[0].text)
    assert "changed & <wrong>" in text
    assert 'class="wrong">changed &amp; &lt;wrong&gt;' in report_html(found)
    answers.loc[row, "correct_mask"] = True
    nothing = words(dataclasses.replace(result, effect=dataclasses.replace(result.effect, answers=answers)))
    assert f"0 of {len(answers)} answers" in nothing
    assert last.text not in nothing


def test_an_empty_mask_and_earlier_starts_have_their_words(result):
    empty = result.masks["mask"] - result.masks["mask"]
    starts = [{"command": "earlier", "versions": {}, "device": "cpu"}]
    found = dataclasses.replace(
        result, masks={**result.masks, "mask": empty}, facts={**result.facts, "earlier_starts": starts}
    )
    text = words(found)
    assert "The mask is empty." in text
    assert "in 1 earlier starts" in text


def test_position_has_its_section_with_what_was_measured(result):
    text, html = words(result), report_html(result)
    supported = [claim for claim in result.position_claims if claim.status == "supported"]
    testable = [claim for claim in result.position_claims if claim.status != "not testable"]
    assert f"Of {len(testable)} claims about position that can be tested here, " in text
    assert (f", {len(supported)} " in text) if supported else ("none is supported" in text)
    old, new = (
        100 * one.attention.rate(0.3) for one in (result.position.before, result.position.after["mask"])
    )
    assert f"In {old:.1f} % of heads and stories it is above 0.3, under the mask in {new:.1f} %." in text
    ((layer, head),) = result.patterns[0].patterns
    assert f"What layer {layer}, head {head} looks at" in text
    assert _packed(result.position.frequencies.query("part == 'q'").before, "f4") in html
    bare = dataclasses.replace(
        result.position,
        before=dataclasses.replace(result.position.before, angles=None, norms=None),
        by_frequency=pd.DataFrame(),
    )
    untestable = [dataclasses.replace(claim, status="not testable") for claim in result.position_claims]
    text = words(dataclasses.replace(result, position=bare, position_claims=untestable))
    assert "None of the paper’s claims about position can be tested here." in text
    assert "Which frequencies carry the norm" not in text
    assert "Attention to BOS" in text


def test_figures_on_the_page_hold_the_frames(result):
    html = report_html(result)
    perplexity = result.sweep.arm("mask").perplexity
    assert all(repr(float(value))[:10] in html or _packed(perplexity) in html for value in perplexity)


def _packed(values: pd.Series, kind: str = "f8") -> str:
    """As plotly writes arrays of numbers: base64 of their bytes, in JSON."""
    import base64

    return (
        base64.b64encode(np.ascontiguousarray(values, dtype=kind).tobytes()).decode().replace("/", "\\u002f")
    )
