"""Studies with planted effects side by side, whose contrast is known."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import tl_tomsparse as tt
from tests.test_effect import ABLE, Planted
from tests.test_report import Page
from tl_tomsparse._model import ModelIdentity
from tl_tomsparse._study_battery import BatterySection
from tl_tomsparse._study_claims import StudyClaim
from tl_tomsparse._study_heads import HeadSection
from tl_tomsparse.comparison import ContrastClaim, StudyComparison
from tl_tomsparse.comparison_report import comparison_html, write_comparison_page
from tl_tomsparse.effect import CONTRAST
from tl_tomsparse.verdict import Claim

LOW = {"false_belief": 0.5}
SHAPES = {(0, "Q"): (1, 4, 20)}


def planted(
    mask: dict[str, float],
    *,
    seed: int,
    random: dict[str, float] | None = None,
    before: dict[str, float] | None = None,
    n_stories: int = 120,
    n_random: int = 20,
    n_weights: int = 40,
    kappa: float = 0.3,
    matrices: tuple[str, ...] = ("Q", "K"),
    tracks: Any = "supported",
    cost: float = 1.0,
    more: tuple[StudyClaim, ...] = (),
) -> tt.Study:
    """A study of a model whose answers are right with these rates; its luck is that of the seed."""
    made = Planted(n_stories=n_stories, seed=seed)
    answers = made.answers(
        {
            "before": [made.point(before or {}, noise=0.0)],
            "mask": [made.point(mask, cost=cost)],
            "random_matrix": [made.point(random or {}) for _ in range(n_random)],
        }
    )
    identity = ModelIdentity(f"model{seed}", f"{seed:032x}", "raw", "4.3.0", 1, 1, 1, 4, 20, 8)
    entries = {(0, "Q"): torch.arange(n_weights)}
    none = pd.DataFrame()
    return tt.Study(
        [StudyClaim("tracks_beliefs", tracks, "."), *more],
        *[none] * 5,
        {"mask": tt.SparseMask(identity, SHAPES, entries)},
        HeadSection([Claim("heads_found", "not supported", ".")]),
        BatterySection([StudyClaim("prose_stays", "supported", ".")]),
        answers,
        kappa,
        {
            "identity": identity.to_dict(),
            "settings": {"matrices": list(matrices), "kappa": kappa, "stories": n_stories},
        },
    )


def compared(**studies: tt.Study) -> StudyComparison:
    found = tt.compare_studies(studies, n_draws=1000)
    assert all(claim.sentence.endswith(".") and "nan" not in claim.sentence for claim in found.claims)
    assert [claim.other for claim in found.claims] == list(studies)[1:]
    return found


def only(found: StudyComparison) -> ContrastClaim:
    (claim,) = found.claims
    assert (claim.claim, claim.model) == ("architecture_specific", next(iter(found.models.model)))
    return claim


def with_questions(study: tt.Study, questions: pd.DataFrame) -> tt.Study:
    return dataclasses.replace(study, answers=dataclasses.replace(study.answers, questions=questions))


@pytest.fixture(scope="module")
def fallen() -> tt.Study:
    return planted(LOW, seed=1)


@pytest.fixture(scope="module")
def untouched() -> tt.Study:
    return planted({}, seed=2)


@pytest.fixture(scope="module")
def both(fallen: tt.Study, untouched: tt.Study) -> StudyComparison:
    return compared(RoPE=fallen, ALiBi=untouched)


def rows(found: StudyComparison, against: str = "random", minus: bool = True) -> pd.DataFrame:
    frame = found.to_frame()
    return frame[(frame.against == against) & (frame.minus.notna() == minus)].set_index("measure")


def test_an_effect_in_one_model_only_is_particular_to_it(both: StudyComparison) -> None:
    claim = only(both)
    assert claim.status == "supported"
    assert claim.paired
    assert claim.low < claim.value < claim.high < -0.2
    assert "falls more, beyond random masks, in RoPE than in ALiBi" in claim.sentence
    assert "paired by question" in claim.sentence
    row = rows(both).loc["false_belief"]
    assert (row.value, row.low, row.high) == (claim.value, claim.low, claim.high)
    assert (row.model, row.minus) == ("RoPE", "ALiBi")


def test_the_same_effect_in_both_is_particular_to_neither(fallen: tt.Study) -> None:
    claim = only(compared(RoPE=fallen, ALiBi=planted(LOW, seed=3)))
    assert claim.status == "not supported"
    assert "is not shown to fall more" in claim.sentence
    assert claim.low < 0 < claim.high


def test_an_effect_of_random_masks_too_is_not_counted(untouched: tt.Study) -> None:
    frail = planted(LOW, seed=1, random=LOW)
    found = compared(frail=frail, ALiBi=untouched)
    assert only(found).status == "not supported"
    assert rows(found, "before").loc["false_belief"].high < -0.2


def test_to_rise_less_is_not_to_fall() -> None:
    less = planted({}, seed=1, random={"false_belief": 0.85})  # above its random masks, both of them
    more = planted({}, seed=2, random={"false_belief": 0.5})
    claim = only(compared(less=less, more=more))
    assert claim.high < -0.2
    assert claim.status == "not supported"
    assert "is not shown to fall more, beyond random masks, in less than in more: +" in claim.sentence
    turned = only(compared(more=more, less=less))
    assert turned.low > 0.2
    assert "is not shown to fall more" in turned.sentence


def test_to_rise_less_than_under_random_masks_is_not_to_fall(untouched: tt.Study) -> None:
    rises = planted(
        {"false_belief": 0.75}, seed=1, before={"false_belief": 0.6}, random={"false_belief": 0.97}
    )
    claim = only(compared(RoPE=rises, ALiBi=untouched))
    assert claim.high < 0
    assert claim.status == "not supported"
    assert "is not shown to fall more" in claim.sentence
    turned = only(compared(ALiBi=untouched, RoPE=rises))
    assert turned.low > 0
    assert "is not shown to fall more" in turned.sentence


def test_the_order_of_the_models_turns_the_sign(both: StudyComparison, fallen: Any, untouched: Any) -> None:
    turned = compared(ALiBi=untouched, RoPE=fallen)
    claim = only(turned)
    assert claim.status == "not supported"
    assert "falls less, beyond random masks, in ALiBi than in RoPE" in claim.sentence
    assert rows(turned).value.to_dict() == pytest.approx((-rows(both).value).to_dict())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tracks": "not supported"}, "Nothing can be damaged in ALiBi, which is not shown to track"),
        ({"tracks": "not testable"}, "Nothing can be damaged in ALiBi"),
        ({"n_weights": 0}, "The mask of ALiBi is empty"),
        ({"n_random": 18}, "18 random masks of ALiBi are too few; use at least 19"),
        (
            {"kappa": 0.1},
            r"made at kappa 0.3 and that of ALiBi at 0.1; study both at one, with StudySettings",
        ),
        ({"matrices": ("Q", "K", "V")}, "of Q, K and that of ALiBi of Q, K, V; study both with the same"),
    ],
)
def test_what_cannot_be_set_side_by_side_is_not_testable(
    options: dict[str, Any], words: str, fallen: tt.Study
) -> None:
    other = planted({}, seed=2, n_stories=40, **options)
    for order in (("RoPE", "ALiBi"), ("ALiBi", "RoPE")):
        found = compared(**{name: {"RoPE": fallen, "ALiBi": other}[name] for name in order})
        claim = only(found)
        assert claim.status == "not testable"
        assert claim.p is None
        assert np.isnan(claim.value)
        if order[0] == "RoPE":
            assert words in claim.sentence
        assert np.isfinite(rows(found).loc["false_belief"].value)  # shown all the same


def test_every_further_model_makes_each_claim_harder(fallen: tt.Study, untouched: tt.Study) -> None:
    hardly = planted({"false_belief": 0.85}, seed=4)
    alone = only(compared(RoPE=hardly, ALiBi=untouched))
    together = compared(RoPE=hardly, ALiBi=untouched, learned=planted({}, seed=5), same=fallen)
    by_name = {claim.other: claim for claim in together.claims}
    assert by_name["ALiBi"].value == alone.value
    assert by_name["ALiBi"].p >= 2 * alone.p
    assert by_name["same"].status == "not supported"


def oracle(study: tt.Study, asked: np.ndarray, family: str) -> float:
    """Change of accuracy on some questions, a question and an arm at a time."""
    answers = study.answers
    arms = [row for row, name in enumerate(answers.families) if name == family]
    mask = answers.families.index("mask")
    total = 0.0
    for question in np.flatnonzero(asked):
        right = [float(answers.correct[arm, question]) for arm in arms]
        total += float(answers.correct[mask, question]) - sum(right) / len(right)
    return total / int(asked.sum())


def test_changes_and_differences_are_those_of_the_answers(fallen: tt.Study, untouched: tt.Study) -> None:
    dear = planted(LOW, seed=1, cost=1.5)
    found = compared(RoPE=dear, ALiBi=untouched)
    category = dear.answers.questions.category.to_numpy()
    for against, family in (("before", "before"), ("random", "random_matrix")):
        own, apart = rows(found, against, minus=False), rows(found, against)
        expected: dict[str, list[float]] = {}
        for name in ABLE:
            expected[name] = [oracle(study, category == name, family) for study in (dear, untouched)]
        expected[CONTRAST] = list(np.subtract(expected["false_belief"], expected["true_belief"]))
        expected["perplexity"] = []
        for study in (dear, untouched):
            answers, losses = study.answers, {}
            for name in ("mask", family):
                arms = [row for row, other in enumerate(answers.families) if other == name]
                each = [answers.nll[row].sum() / answers.n_tokens.sum() for row in arms]
                losses[name] = sum(each) / len(each)
            expected["perplexity"].append(losses["mask"] - losses[family])
        for name, values in expected.items():
            assert own.loc[name].value.tolist() == pytest.approx(values, abs=1e-12), name
            assert apart.loc[name].value == pytest.approx(values[0] - values[1], abs=1e-12), name
            assert apart.loc[name].low <= apart.loc[name].value <= apart.loc[name].high
    assert rows(found).loc["perplexity"].value == pytest.approx(np.log(1.5), abs=0.01)
    arms = dear.answers.correct[:, category == "false_belief"].mean(1)
    seeds = arms[2:] - arms[0]
    row = rows(found, "before", minus=False).loc["false_belief"].iloc[0]
    assert (row.random_low, row.random_high) == pytest.approx((seeds.min(), seeds.max()))
    assert row.random == pytest.approx(seeds.mean())
    assert row.n == (category == "false_belief").sum()


def test_pairing_needs_the_same_questions_measure_by_measure(fallen: tt.Study) -> None:
    twin = planted({"false_belief": 0.8}, seed=1)  # the same luck, so that pairing tells
    questions = twin.answers.questions
    paired = rows(compared(a=fallen, b=twin))
    assert paired.paired.all()
    reality = questions.category == "reality"
    reworded = questions.assign(prompt=questions.prompt.where(~reality, questions.prompt + " really"))
    some = rows(compared(a=fallen, b=with_questions(twin, reworded)))
    assert some.index[~some.paired.astype(bool)].tolist() == ["reality"]
    assert some.loc["false_belief"].low == paired.loc["false_belief"].low
    other_groups = questions.assign(group="other " + questions.group)
    apart = compared(a=fallen, b=with_questions(twin, other_groups))
    none = rows(apart)
    assert none.index[none.paired.astype(bool)].tolist() == ["perplexity"]
    assert "of different questions" in only(apart).sentence
    assert none.value.to_dict() == pytest.approx(paired.value.to_dict())
    width = [row.high - row.low for row in (paired.loc["false_belief"], none.loc["false_belief"])]
    assert width[0] < 0.85 * width[1]


def test_other_texts_are_not_paired(fallen: tt.Study, untouched: tt.Study) -> None:
    other = dataclasses.replace(untouched, answers=dataclasses.replace(untouched.answers, text="other"))
    found = rows(compared(a=fallen, b=other))
    assert found.index[~found.paired.astype(bool)].tolist() == ["perplexity"]


def test_questions_in_another_order_are_the_same_questions(
    both: StudyComparison, fallen: tt.Study, untouched: tt.Study
) -> None:
    answers = untouched.answers
    stories = answers.questions.story_id
    order = np.concatenate([np.flatnonzero(stories == name) for name in stories.unique()[::-1]])
    turned = dataclasses.replace(
        answers,
        questions=answers.questions.iloc[order].reset_index(drop=True),
        correct=answers.correct[:, order],
    )
    found = compared(RoPE=fallen, ALiBi=dataclasses.replace(untouched, answers=turned))
    pd.testing.assert_frame_equal(rows(found), rows(both))


def test_claims_of_all_studies_are_one_table(fallen: tt.Study) -> None:
    pair = StudyClaim("more_than_random_pair", "supported", ".")
    dose = StudyClaim("dose", "not supported", ".")
    found = compared(
        RoPE=planted(LOW, seed=1, n_stories=40, more=(pair, dose)),
        ALiBi=planted({}, seed=2, n_stories=44, more=(dose,)),
    )
    assert found.statuses.to_dict("index") == {
        "tracks_beliefs": {"RoPE": "supported", "ALiBi": "supported"},
        "more_than_random_pair": {"RoPE": "supported", "ALiBi": "not made"},
        "dose": {"RoPE": "not supported", "ALiBi": "not supported"},
        "heads: heads_found": {"RoPE": "not supported", "ALiBi": "not supported"},
        "localisation: prose_stays": {"RoPE": "supported", "ALiBi": "supported"},
    }
    assert found.settings.to_dict("index") == {"stories": {"RoPE": "40", "ALiBi": "44"}}
    assert list(found.models.n_weights) == [40, 40]
    assert repr(found).startswith("StudyComparison(2 models; RoPE falls more: than ALiBi ")


def test_what_is_no_pair_of_studies_is_refused(fallen: tt.Study) -> None:
    with pytest.raises(tt.TomsparseError, match="has 1 of them; pass at least two"):
        tt.compare_studies({"RoPE": fallen})
    with pytest.raises(tt.TomsparseError, match=r"studies\['x'\] is a str and not a Study; read it with"):
        tt.compare_studies({"RoPE": fallen, "x": "runs/x"})  # type: ignore[dict-item]
    with pytest.raises(tt.TomsparseError, match="n_draws=0"):
        tt.compare_studies({"RoPE": fallen, "x": fallen}, n_draws=0)


def test_the_figure_holds_the_numbers(both: StudyComparison) -> None:
    figure = tt.plot.study_comparison(both)
    own = rows(both, "before", minus=False)
    for model in ("RoPE", "ALiBi"):
        mine = own[own.model == model]
        above, below = (trace for trace in figure.data if trace.name == model and trace.xaxis in ("x", "x3"))
        assert list(above.x) == pytest.approx(100 * mine.drop("perplexity").value.to_numpy()[::-1])
        assert list(below.x) == pytest.approx([mine.loc["perplexity"].value])
        ends = np.array(above.x) - np.array(above.error_x.arrayminus)
        assert ends == pytest.approx(100 * mine.drop("perplexity").low.to_numpy()[::-1])
        band = next(trace for trace in figure.data if trace.name == f"{model}, random masks")
        ends = np.array(band.x) + np.array(band.error_x.array)
        assert ends == pytest.approx(100 * mine.drop("perplexity").random_high.to_numpy()[::-1])
    assert sum(bool(trace.showlegend) for trace in figure.data) == 4


def test_names_of_models_are_no_html(fallen: tt.Study, untouched: tt.Study) -> None:
    figure = tt.plot.study_comparison(compared(**{"RoPE": fallen, "a<b>&c": untouched}))
    assert {trace.name for trace in figure.data} >= {"a&lt;b&gt;&amp;c", "a&lt;b&gt;&amp;c, random masks"}


def test_the_page_says_what_the_numbers_say(fallen: tt.Study, untouched: tt.Study, tmp_path: Path) -> None:
    odd = "a<b>&c"
    found = compared(**{"RoPE": fallen, odd: untouched, "weak": planted({}, seed=6, tracks="not supported")})
    write_comparison_page(tmp_path / "page.html", found)
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert html == comparison_html(found)
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base")
        assert not {"src", "href"} & attributes.keys()
    assert "<b>" not in html[: html.index("<script")]
    for claim in found.claims:
        assert claim.sentence in page.text
    assert f"is larger than in {odd}, cannot be tested to be larger than in weak" in page.text
    for row in found.frame[found.frame.measure == "false_belief"].itertuples():
        assert f"{row.value:+.3f} {row.low:+.3f} to {row.high:+.3f}" in page.text
    assert "same settings" in page.text
