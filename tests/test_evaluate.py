"""Scores against one unpadded forward an option in float64; tables against counting by hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import beta

from tests import tiny
from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._model import ModelView, view
from tl_tomsparse._prepared import decide, prepare_scoring
from tl_tomsparse._scoring import _trees
from tl_tomsparse.evaluate import StoryScores, perplexity, score_stories
from tl_tomsparse.samples import text_samples
from tl_tomsparse.stories.story import Question, Story

STORIES = [tiny.story(index) for index in range(7)]


def odd_story(**changes) -> Story:
    """Three options of different numbers of tokens, two of which begin with the same token."""
    question = Question(
        "reality", (), "The ball is in the", "completion", "basketry", ("bag", "basketry", "box")
    )
    story = dataclasses.replace(tiny.story(0), id="odd", questions=(question,))
    return dataclasses.replace(story, **changes)


def oracle(hf, tokenizer, text: str, option: str, bos: bool = True) -> tuple[float, int]:
    """The summed log-probability of an option from one unpadded forward, and its number of tokens."""
    start = [tokenizer.bos_token_id] if bos else []
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer(f"{text} {option}", add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt)] == prompt
    with torch.no_grad():
        logprobs = hf(torch.tensor([start + whole])).logits[0].log_softmax(-1)
    places = range(len(start) + len(prompt), len(start) + len(whole))
    return sum(float(logprobs[place - 1, (start + whole)[place]]) for place in places), len(places)


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_scores_are_those_of_single_unpadded_forwards(kind, backend):
    model, hf = tiny.model(kind, backend), tiny.hf_model(kind)
    stories = [*STORIES[:3], odd_story()]
    prepared = prepare_scoring(model, stories, batch_tokens=150)
    found = prepared.option_scores(model)
    texts = [story.prompt(question) for story in stories for question in story.questions]
    for text, options, row in zip(texts, prepared.options, found):
        expected = [oracle(hf, model.tokenizer, text, option)[0] for option in options]
        np.testing.assert_allclose(row[: len(options)], expected, atol=2e-4)
        assert np.isneginf(row[len(options) :]).all()
    frame = score_stories(model, stories, show_progress=False).frame
    last = frame.iloc[-1]
    expected = {o: oracle(hf, model.tokenizer, texts[-1], o)[0] for o in ("bag", "basketry", "box")}
    assert last.chosen == max(expected, key=expected.__getitem__)
    assert last.logprob_answer == pytest.approx(expected["basketry"], abs=2e-4)
    assert last.margin == pytest.approx(
        expected["basketry"] - max(expected["bag"], expected["box"]), abs=2e-4
    )
    assert last.n_options == 3


def test_without_bos_and_per_token():
    model, hf = tiny.model(), tiny.hf_model()
    story = odd_story()
    text = story.prompt(story.questions[0])
    frame = score_stories(model, [story], prepend_bos=False, normalise="tokens", show_progress=False).frame
    total, n = oracle(hf, model.tokenizer, text, "basketry", bos=False)
    assert n > 1
    assert frame.logprob_answer[0] == pytest.approx(total / n, abs=1e-4)


def test_batches_do_not_matter_and_work_is_shared():
    model = tiny.model()
    small = prepare_scoring(model, STORIES, batch_tokens=1)
    large = prepare_scoring(model, STORIES, batch_tokens=100_000)
    np.testing.assert_allclose(small.option_scores(model), large.option_scores(model), atol=1e-5)
    assert small.digest == large.digest
    assert all(len(batch.tokens) == 1 for batch in small.reads.batches)
    assert len(large.reads.batches) == 1
    # Options of one token share the prompt's row, and the row of "basketry" begins with it.
    prompts = {story.prompt(question) for story in STORIES for question in story.questions}
    assert len(large.reads.batches[0].tokens) == len(prompts)
    assert len(prepare_scoring(model, [odd_story()]).reads.batches[0].tokens) == 1


@pytest.mark.parametrize("backend", tiny.BACKENDS)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_packed_stories_give_the_same_scores_for_less_work(kind, backend):
    model = tiny.model(kind, backend)
    stories = [*STORIES, odd_story()]
    plain = prepare_scoring(model, stories, batch_tokens=200)
    packed = prepare_scoring(model, stories, batch_tokens=200, pack=True)
    finite = np.isfinite(plain.option_scores(model))
    np.testing.assert_allclose(
        packed.option_scores(model)[finite], plain.option_scores(model)[finite], atol=1e-4
    )
    assert packed.digest == plain.digest
    if backend == "bridge":
        assert packed.reads.n_tokens < 0.45 * plain.reads.n_tokens
    else:  # HookedTransformer does not take such masks; this is noticed, and rows stay plain
        assert packed.reads.n_tokens == plain.reads.n_tokens


def test_packing_changes_nothing_in_the_table_of_scores_but_rounding():
    model, stories = tiny.model(), [*STORIES, odd_story()]
    for normalise in ("none", "tokens"):
        options = {"normalise": normalise, "show_progress": False}
        plain = score_stories(model, stories, **options)
        packed = score_stories(model, stories, pack=True, **options)
        pd.testing.assert_frame_equal(packed.frame, plain.frame, rtol=0, atol=1e-4)
        assert packed.normalise == normalise


def test_a_model_that_does_not_obey_the_mask_is_noticed(monkeypatch):
    def logits_without_mask(self, tokens, attention, positions=None):
        return whole(self, tokens, torch.ones_like(tokens, dtype=torch.bool))

    model = tiny.model()
    plain = prepare_scoring(model, STORIES)
    whole = ModelView.logits
    monkeypatch.setattr(ModelView, "logits", logits_without_mask)
    careful = prepare_scoring(model, STORIES, pack=True)
    assert careful.reads.n_tokens == plain.reads.n_tokens


def test_trees_of_any_shape_hold_every_row():
    rng = np.random.default_rng(0)
    for longest in (0, 12, 40):
        rows = [tuple(rng.integers(0, 2, rng.integers(1, 14)).tolist()) for _ in range(60)]
        wanted = [(row, [(len(row) - 1, number)]) for number, row in enumerate(rows)]
        found = {}
        for tree in _trees(wanted, longest):
            assert not tree.branched or len(tree.tokens) <= longest
            for node, _, total in tree.reads:
                branch, at = [], node
                while at >= 0:
                    branch.append(tree.tokens[at])
                    assert tree.positions[at] == len(branch) * -1 + tree.positions[node] + 1
                    at = tree.parents[at]
                found[total] = tuple(branch[::-1])
                assert tree.attention()[node].sum() == len(branch)
        assert [found[number] for number in range(len(rows))] == rows


def test_digest_tells_tokens_and_questions_apart():
    model = tiny.model()
    digests = [
        prepare_scoring(model, STORIES).digest,
        prepare_scoring(model, STORIES[:-1]).digest,
        prepare_scoring(model, STORIES, prepend_bos=False).digest,
        prepare_scoring(model, STORIES, categories=["reality"]).digest,
        prepare_scoring(model, STORIES, normalise="tokens").digest,
    ]
    assert len(set(digests)) == len(digests)


def test_ties_are_wrong_and_shown_as_another_option():
    outcome = decide(np.array([[1.0, 1.0, -np.inf], [2.0, 1.0, 1.5], [0.0, 1.0, 3.0]]))
    assert outcome.chosen.tolist() == [1, 0, 2]
    assert outcome.margin.tolist() == [0.0, 0.5, -3.0]
    assert (outcome.margin > 0).tolist() == [False, True, False]


def planted() -> StoryScores:
    """Answers set by hand: story a all right, b one belief wrong, c a single agent, d no false belief."""
    model = tiny.model()
    base = tiny.story(0)
    first, last = base.questions[0].answer, base.questions[1].answer
    ask = base.questions[0]
    plain = Question("belief", ("Anna",), ask.text, "completion", last, (first, last), True)
    third = dataclasses.replace(ask, agents=("Ben",), text="Ben will look for the ball in the")
    stories = [
        dataclasses.replace(base, id="a"),
        dataclasses.replace(base, id="b", condition="present"),
        dataclasses.replace(base, id="c", questions=(ask, base.questions[3])),
        dataclasses.replace(base, id="d", questions=(plain, dataclasses.replace(plain, agents=("Ben",)))),
        # two agents with one and the same false belief: a story-level answer would pass
        dataclasses.replace(base, id="e", questions=(ask, third)),
    ]
    scores = score_stories(model, stories, show_progress=False)
    frame = scores.frame.assign(correct=True)
    frame.loc[(frame.story_id == "b") & (frame.category == "true_belief"), "correct"] = False
    frame.loc[(frame.story_id == "d") & (frame.agents == "Ben"), "correct"] = False
    return dataclasses.replace(scores, frame=frame)


def test_accuracy_is_counted_by_category_with_exact_intervals():
    table = planted().accuracy().set_index("category")
    assert list(table.index) == ["false_belief", "true_belief", "reality", "memory", "second_order"]
    assert table.n.tolist() == [5, 4, 3, 2, 2]
    assert table.correct.tolist() == [5, 2, 3, 2, 2]
    row = table.loc["true_belief"]
    assert (row.low, row.high) == pytest.approx((beta.ppf(0.025, 2, 3), beta.ppf(0.975, 3, 2)))
    assert table.loc["false_belief"].low == pytest.approx(0.025 ** (1 / 5))
    assert (table.chance == 0.5).all()
    by = planted().accuracy(by=["scenario", "condition"])
    found = by[(by.condition == "present") & (by.category == "true_belief")]
    assert found[["scenario", "n", "correct"]].values.tolist() == [["transfer", 1, 0]]


def test_paired_needs_every_agent_right_where_their_answers_differ():
    table = planted().paired().set_index("subset")
    assert table.loc["false_belief_stories"][["n", "correct", "chance"]].tolist() == [2, 1, 0.25]
    assert table.loc["all_stories"][["n", "correct"]].tolist() == [5, 3]
    by = planted().paired(by=["condition"])
    assert by[by.subset == "false_belief_stories"].set_index("condition").correct.to_dict() == {
        "false_belief": 1,
        "present": 0,
    }


def test_a_story_level_answer_cannot_pass_paired():
    scores = score_stories(tiny.model(), STORIES, show_progress=False)
    for place in ("basket", "box", "bag"):  # always the same place, whoever is asked
        frame = scores.frame.assign(correct=scores.frame.answer == place)
        paired = dataclasses.replace(scores, frame=frame).paired().set_index("subset")
        assert paired.loc["false_belief_stories"].n == len(STORIES)
        assert paired.loc["false_belief_stories"].correct == 0


def test_only_some_questions():
    frame = score_stories(tiny.model(), STORIES, categories=["memory", "reality"], show_progress=False).frame
    assert set(frame.category) == {"memory", "reality"}
    assert len(frame) == 2 * len(STORIES)
    assert list(frame.question[:2]) == [3, 4]


@pytest.mark.parametrize(
    ("stories", "options", "message"),
    [
        ([], {}, "No question"),
        (STORIES, {"forms": ["question"]}, "No question"),
        (STORIES, {"categories": ["feelings"]}, "feelings"),
        (STORIES, {"normalise": "words"}, "words"),
        ([STORIES[0], STORIES[0]], {}, "Two stories have the id 's0'"),
        ([odd_story(text="Sally waits. " * 80)], {}, "odd"),
        (
            [odd_story(questions=(Question("reality", (), "It is in the", "completion", "box", ("bag",)),))],
            {},
            "box",
        ),
    ],
)
def test_refusals_name_the_thing(stories, options, message):
    with pytest.raises(TomsparseError, match=message):
        score_stories(tiny.model(), stories, show_progress=False, **options)


def test_a_model_that_overflows_is_refused_with_the_story():
    model = tiny.model()
    prepared = prepare_scoring(model, STORIES)
    prepared.option_scores(model)
    with torch.no_grad():
        view(model).weight((1, "out")).fill_(float("nan"))
    with pytest.raises(TomsparseError, match="story 's0', question 0"):
        prepared.option_scores(model)
    with pytest.raises(TomsparseError, match="sample 'tokens"):
        perplexity(model, text_samples(model, list(tiny.CORPUS), length=16), show_progress=False)


def test_training_mode_is_refused():
    model = tiny.model()
    model.train()
    with pytest.raises(TomsparseError, match="training mode"):
        score_stories(model, STORIES, show_progress=False)


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_perplexity_is_total_loss_over_total_tokens(backend):
    model, hf = tiny.model("neox", backend), tiny.hf_model("neox")
    windows = text_samples(model, list(tiny.CORPUS), length=24)
    # unequal lengths, so that the mean of means would be another number
    mask = windows.attention_mask.clone()
    mask[0, 9:] = False
    samples = dataclasses.replace(windows, attention_mask=mask, supervised=windows.supervised & mask)
    found = perplexity(model, samples, batch_tokens=60, show_progress=False)
    nll, n_tokens = [], []
    for tokens, keep in zip(samples.tokens, mask):
        row = tokens[keep][None]
        with torch.no_grad():
            logprobs = hf(row).logits[0, :-1].log_softmax(-1)
        nll.append(-float(logprobs.gather(-1, row[0, 1:, None]).sum()))
        n_tokens.append(row.shape[1] - 1)
    np.testing.assert_allclose(found.nll, nll, rtol=1e-5)
    assert found.n_tokens.tolist() == n_tokens
    assert found.value == pytest.approx(math.exp(sum(nll) / sum(n_tokens)), rel=1e-5)
    frame = found.to_frame()
    assert list(frame["sample"]) == list(samples.ids)
    assert frame.perplexity[0] == pytest.approx(math.exp(nll[0] / n_tokens[0]), rel=1e-5)
