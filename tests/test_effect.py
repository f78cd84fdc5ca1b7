"""Effects with planted answers, whose verdict is known; and one measured on a tiny random model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import pytest

from tests import tiny
from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._intervals import ClusterBootstrap
from tl_tomsparse._points import Measures, Point
from tl_tomsparse._prepared import Outcome, PreparedScoring, PreparedText
from tl_tomsparse._scoring import Reads
from tl_tomsparse._study_answers import Answers, collect_answers
from tl_tomsparse.edit import SparseEdit
from tl_tomsparse.effect import CONTRAST, EXACT, RANGE, Effect, assemble, effect
from tl_tomsparse.evaluate import perplexity, score_stories, tabulate
from tl_tomsparse.experiment import arm_masks
from tl_tomsparse.samples import story_samples, text_samples
from tl_tomsparse.sensitivity import fisher_diagonal
from tl_tomsparse.verdict import Claim, verdict

CLAIMS = [
    "selective_effect",
    "tracks_beliefs",
    "false_belief_falls",
    "more_than_random",
    "true_belief_stays",
    "reality_stays",
    "perplexity_stays",
]
ABLE = {"false_belief": 0.95, "true_belief": 0.97, "reality": 0.98, "memory": 0.9, "second_order": 0.7}
NOTHING = Reads((), 0, 0, "")


class Planted:
    """Stories with every category of question, and answers that are right with given rates."""

    def __init__(self, n_stories: int = 200, n_samples: int = 60, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        rows = []
        for number in range(n_stories):
            story = tiny.story(number)
            for index, question in enumerate(story.questions):
                rows.append(
                    {
                        "story_id": f"s{number}", "group": f"s{number}",
                        "scenario": "transfer", "condition": "false_belief",
                        "protagonist": "Sally", "split": "test", "wording": "seen", "question": index,
                        "category": question.category, "kind": question.kind, "order": question.order,
                        "form": "completion", "agents": ", ".join(question.agents), "answer": question.answer,
                        "n_options": 2,
                    }
                )  # fmt: skip
        self.questions = pd.DataFrame(rows)
        n = len(rows)
        self.scoring = PreparedScoring(
            self.questions, tuple(("right", "wrong") for _ in range(n)), NOTHING, True, "none", np.ones(2 * n)
        )
        self.text = PreparedText(
            NOTHING, np.full(n_samples, 127), tuple(f"text {index}" for index in range(n_samples))
        )
        self.nll = 127 * (2 + 0.3 * self.rng.standard_normal(n_samples))
        self.luck = self.rng.random(n)  # the same in every arm: an edit changes few answers

    def point(self, rates: dict[str, float], *, cost=1.0, noise=0.01) -> Point:
        """Right where a question has luck below its rate; perplexity about `cost` times as high."""
        rate = self.questions.category.map(ABLE | rates).to_numpy()
        correct = self.luck < rate
        flip = self.rng.random(len(correct)) < noise
        margin = np.where(correct ^ flip, 1.0, -1.0)
        nll = self.nll + 127 * np.log(cost) + 127 * 0.01 * self.rng.standard_normal(len(self.nll))
        return Point(Outcome(np.where(margin > 0, 0, 1), margin), nll)

    def answers(self, points: Mapping[str, Sequence[Point]]) -> Answers:
        """Of these points, the questions put as in the tiny stories."""
        stories = map(tiny.story, range(self.questions.story_id.nunique()))
        prompts = [story.prompt(question) for story in stories for question in story.questions]
        families = [family for family, some in points.items() for _ in some]
        return collect_answers(self.scoring, self.text, prompts, points, families)

    def effect(self, before: dict, mask: dict, random: dict, *, cost=1.0, n_random=20, **meta) -> Effect:
        points = {
            "before": [self.point(before, noise=0)],
            "mask": [self.point(mask, cost=cost)],
            "general_only": [self.point(before)],
            "random": [self.point(random) for _ in range(n_random)],
        }
        weights = {"before": 0, "mask": 40, "general_only": 45, "random": 40}
        made = {"kappa": 1e-3, "seed": 0, "n_draws": 2000, "accuracy_margin": 0.05, "perplexity_margin": 0.05}
        return assemble(self.scoring, self.text, points, weights | meta.pop("n_weights", {}), made | meta)


def claims(found: Effect) -> dict[str, Claim]:
    listed = verdict(found)
    assert [claim.claim for claim in listed] == CLAIMS
    assert all(claim.sentence.endswith(".") and "nan" not in claim.sentence for claim in listed)
    return {claim.claim: claim for claim in listed}


def statuses(found: Effect) -> dict[str, str]:
    return {name: claim.status for name, claim in claims(found).items()}


def test_a_selective_effect_is_supported_with_its_numbers():
    found = claims(Planted().effect({}, {"false_belief": 0.5}, {"false_belief": 0.93}))
    assert {claim.status for claim in found.values()} == {"supported"}
    sentence = found["false_belief_falls"].sentence
    assert "of 200 questions" in sentence
    assert "95 % interval" in sentence
    assert "40 weights" in found["selective_effect"].sentence
    assert found["false_belief_falls"].p < 0.01


def test_no_effect_is_called_no_effect():
    found = claims(Planted().effect({}, {}, {}))
    assert found["false_belief_falls"].status == "not supported"
    assert found["false_belief_falls"].sentence.startswith("No effect found")
    assert found["more_than_random"].status == "not supported"
    assert found["selective_effect"].status == "not supported"
    assert "No effect found" in found["selective_effect"].sentence
    assert found["reality_stays"].status == "supported"


def test_a_fall_that_is_not_shown_within_the_family_is_not_called_no_effect():
    few = Planted(40).effect({}, {"false_belief": 0.75}, {"false_belief": 0.75})
    row = few.differences.set_index(["comparison", "measure"]).loc[("mask - before", "false_belief")]
    assert row.high < 0  # by itself it would be shown
    found = claims(few)["false_belief_falls"]
    assert found.status == "not supported"
    assert found.p > 0.05
    assert "is not shown, all claims taken together" in found.sentence


def test_a_rise_is_not_a_fall():
    found = claims(Planted().effect({"false_belief": 0.7}, {"false_belief": 0.95}, {"false_belief": 0.7}))
    assert found["false_belief_falls"].status == "not supported"
    assert "rises" in found["false_belief_falls"].sentence


def test_damage_to_everything_is_not_selective():
    everything = dict.fromkeys(ABLE, 0.55)
    found = statuses(Planted().effect({}, everything, {}, cost=3.0))
    assert found["false_belief_falls"] == found["more_than_random"] == "supported"
    for name in ("true_belief_stays", "reality_stays", "perplexity_stays", "selective_effect"):
        assert found[name] == "not supported"


def test_random_masks_that_do_the_same_leave_no_claim():
    found = statuses(Planted().effect({}, {"false_belief": 0.6}, {"false_belief": 0.6}))
    assert found["false_belief_falls"] == "supported"
    assert found["more_than_random"] == found["selective_effect"] == "not supported"


def test_one_random_mask_as_low_is_too_many_of_twenty():
    planted = Planted()
    effect_ = planted.effect({}, {"false_belief": 0.6}, {"false_belief": 0.93})
    lowest = effect_.random.copy()
    lowest.loc[0, "false_belief"] = 0.3
    found = claims(dataclasses.replace(effect_, random=lowest))["more_than_random"]
    assert found.status == "not supported"
    assert "1 of them as low" in found.sentence


def test_to_rise_less_than_under_random_masks_is_not_to_fall():
    effect = Planted().effect({"false_belief": 0.75}, {"false_belief": 0.8}, {})
    found = claims(effect)
    assert found["tracks_beliefs"].status == "supported"
    row = effect.differences.set_index(["comparison", "measure"]).loc[("mask - random", "false_belief")]
    assert row.high < 0
    assert found["more_than_random"].status == "not supported"


def test_few_random_masks_cannot_be_a_placebo():
    found = claims(Planted().effect({}, {"false_belief": 0.5}, {}, n_random=5))
    assert found["more_than_random"].status == "not testable"
    assert "at least 19" in found["more_than_random"].sentence


def test_a_model_at_chance_has_nothing_to_damage():
    chance = dict.fromkeys(ABLE, 0.5)
    found = statuses(Planted().effect(chance, dict.fromkeys(ABLE, 0.3), chance))
    assert found["tracks_beliefs"] == "not supported"
    for name in (
        "selective_effect",
        "false_belief_falls",
        "more_than_random",
        "true_belief_stays",
        "reality_stays",
    ):
        assert found[name] == "not testable"


def test_a_shortcut_that_ignores_the_agent_does_not_pass_the_gate():
    """Always the first place: all false beliefs right, all true ones wrong, and no story right as a whole."""
    found = statuses(Planted().effect({"false_belief": 1, "true_belief": 0}, {"false_belief": 0.3}, {}))
    assert found["tracks_beliefs"] == "not supported"
    assert (
        found["false_belief_falls"]
        == found["more_than_random"]
        == found["true_belief_stays"]
        == "not testable"
    )
    assert found["reality_stays"] == "supported"


def test_few_stories_and_few_samples_show_no_staying():
    found = statuses(Planted(n_stories=14, n_samples=5).effect({}, {}, {}))
    assert found["true_belief_stays"] == "not supported"
    assert found["perplexity_stays"] == "not testable"


def test_an_empty_mask_supports_nothing():
    found = statuses(Planted().effect({}, {}, {}, n_weights={"mask": 0, "random": 0}))
    assert {status for name, status in found.items() if name != "tracks_beliefs"} == {"not testable"}


def test_questions_that_are_not_asked_are_not_testable():
    planted = Planted()
    keep = planted.questions.category.isin(["reality", "memory"])
    planted.questions = planted.questions[keep].reset_index(drop=True)
    planted.luck = planted.luck[keep]
    planted.scoring = dataclasses.replace(planted.scoring, questions=planted.questions)
    found = claims(planted.effect({}, {}, {}))
    assert found["tracks_beliefs"].status == found["selective_effect"].status == "not testable"
    assert "No question of the category true_belief" in found["true_belief_stays"].sentence
    assert found["reality_stays"].status == "supported"


def test_family_errors_are_rare_where_nothing_happens():
    """False claims of a fall under an edit that only flips answers at random, over many planted worlds."""
    wrong = 0
    for seed in range(12):
        planted = Planted(n_stories=60, n_samples=12, seed=seed)
        points = {
            arm: [planted.point({"false_belief": 0.8}, noise=0.1) for _ in range(n)]
            for arm, n in (("before", 1), ("mask", 1), ("random", 20))
        }
        made = {"kappa": None, "seed": 0, "n_draws": 500, "accuracy_margin": 0.05, "perplexity_margin": 0.05}
        weights = {"before": 0, "mask": 4, "random": 4}
        found = statuses(assemble(planted.scoring, planted.text, points, weights, made))
        wrong += found["false_belief_falls"] == "supported" or found["more_than_random"] == "supported"
    assert wrong <= 2


def test_tables_are_what_counting_gives():
    planted = Planted()
    found = planted.effect({}, {"false_belief": 0.5}, {"false_belief": 0.9})
    accuracy = found.accuracy.set_index(["arm", "measure"])
    assert accuracy.loc[("before", "false_belief")].interval == EXACT
    random = accuracy.loc[("random", "false_belief")]
    assert random.interval == RANGE
    assert (random.low, random.high) == (found.random.false_belief.min(), found.random.false_belief.max())
    assert random.accuracy == pytest.approx(found.random.false_belief.mean())
    differences = found.differences.set_index(["comparison", "measure"])
    for measure in (*ABLE, "paired"):
        change = accuracy.loc[("mask", measure)].accuracy - accuracy.loc[("before", measure)].accuracy
        assert differences.loc[("mask - before", measure)].value == pytest.approx(change)
        change = accuracy.loc[("mask", measure)].accuracy - accuracy.loc[("random", measure)].accuracy
        assert differences.loc[("mask - random", measure)].value == pytest.approx(change)
    by_measure = differences.loc["mask - before"].value
    assert by_measure[CONTRAST] == pytest.approx(by_measure.false_belief - by_measure.true_belief)
    assert (found.differences.low <= found.differences.value).all()
    assert (found.differences.value <= found.differences.high).all()
    json.loads(json.dumps(found.to_dict(), allow_nan=False))


def test_measures_count_as_story_scores_do():
    planted = Planted()
    measures = Measures(planted.questions)
    point = planted.point({"true_belief": 0.6})
    scores = tabulate(planted.scoring, point.outcome)
    expected = scores.accuracy().set_index("category").accuracy.to_dict()
    expected["paired"] = scores.paired().set_index("subset").loc["false_belief_stories"].accuracy
    assert {name: measures.accuracy(point.correct, name) for name in measures.names} == pytest.approx(
        expected
    )


def twins(planted: Planted) -> Planted:
    """The same questions, with stories 2k and 2k + 1 as one group."""
    number = planted.questions.story_id.str[1:].astype(int)
    questions = planted.questions.assign(group="s" + (number - number % 2).astype(str))
    planted.scoring = dataclasses.replace(planted.scoring, questions=questions)
    return planted


def test_intervals_cover_where_twins_fall_together():
    """Half of the twins lose their false beliefs, both of a pair or none: by story it is too narrow."""
    planted, rng, runs, truth = Planted(n_stories=100), np.random.default_rng(0), 200, -0.5
    by_group = Measures(twins(planted).scoring.questions)
    by_story = Measures(Planted(n_stories=100).questions)
    number = planted.questions.story_id.str[1:].astype(int).to_numpy()
    assert (by_group.n_groups, by_group.n_stories, by_story.n_groups) == (50, 100, 100)
    covered = {"group": 0, "story": 0}
    before = np.ones(len(number), dtype=bool)
    for run in range(runs):
        after = rng.random(50)[number // 2] < 0.5
        for name, measures in (("group", by_group), ("story", by_story)):
            change = measures.counts(after, "false_belief") - measures.counts(before, "false_belief")
            boot = ClusterBootstrap(measures.n_groups, n_draws=400, seed=run)
            estimate = boot.ratio(change, measures.totals["false_belief"])
            covered[name] += estimate.low <= truth <= estimate.high
    assert 0.92 <= covered["group"] / runs <= 0.99
    assert covered["story"] / runs < 0.88


def test_an_effect_draws_twins_together():
    rates = {"false_belief": 0.5}
    alone, together = (planted.effect({}, rates, {}) for planted in (Planted(), twins(Planted())))
    assert (alone.meta["n_groups"], together.meta["n_groups"]) == (200, 100)
    pd.testing.assert_frame_equal(alone.accuracy, together.accuracy)
    assert together.differences.value.tolist() == pytest.approx(alone.differences.value.tolist())
    width = [(f.differences.high - f.differences.low).to_numpy() for f in (alone, together)]
    assert (width[0] != width[1]).all()


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_an_effect_measured_on_a_model(backend):
    model = tiny.model("neox", backend)
    stories = [tiny.story(index) for index in range(8)]
    text = text_samples(model, list(tiny.CORPUS), length=16)
    tom = fisher_diagonal(model, story_samples(model, stories), show_progress=False)
    general = fisher_diagonal(model, text, show_progress=False)
    masks = arm_masks(tom, general, 0.1)
    stored: list[dict] = []
    options = {
        "stories": stories,
        "text": text,
        "kappa": 0.1,
        "n_random": 4,
        "n_draws": 300,
        "show_progress": False,
    }
    found = effect(model, masks, on_point=stored.append, **options)
    assert set(found.accuracy.arm) == {"before", "mask", "general_only", "tom_only", "random"}
    before = score_stories(model, stories, show_progress=False)
    with SparseEdit.mean(model, masks["mask"]).applied(model):
        after = score_stories(model, stories, show_progress=False)
        cost = perplexity(model, text, show_progress=False).value
    assert (found.answers.correct_before == before.frame.correct).all()
    assert (found.answers.chosen_mask == after.frame.chosen).all()
    assert found.perplexity.set_index("arm").perplexity["mask"] == pytest.approx(cost, rel=1e-5)
    assert found.n_weights["random"] == found.n_weights["mask"] == len(masks["mask"])
    assert len(claims(found)) == len(CLAIMS)
    again: list[dict] = []
    resumed = effect(model, masks, on_point=again.append, resume=json.loads(json.dumps(stored)), **options)
    assert not again
    assert resumed.to_dict() == found.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": {}}, "must have 'mask'"),
        ({"stories": [dataclasses.replace(tiny.story(0), split="dev")]}, "split 'dev'"),
        ({"n_random": 0}, "n_random"),
        ({"operator": "resample"}, "resample"),
    ],
)
def test_refusals(change, message):
    model = tiny.model()
    stories = [tiny.story(0)]
    text = text_samples(model, list(tiny.CORPUS), length=16)
    tom = fisher_diagonal(model, story_samples(model, stories), show_progress=False)
    arguments = {"masks": arm_masks(tom, tom, 0.01), "stories": stories, "text": text} | change
    with pytest.raises(TomsparseError, match=message):
        effect(model, arguments.pop("masks"), show_progress=False, **arguments)
