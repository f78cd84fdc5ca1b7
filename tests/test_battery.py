"""A battery against the functions that it is made of, by counting; under edits; its gate."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import beta

import tl_tomsparse as tt
from tests import oracles, tiny
from tl_tomsparse._checks import TomsparseError
from tl_tomsparse.battery import TASKS, score_table

SMALL = {"n": 6, "n_localisation": 3, "n_windows": 3, "distances": (64, 128)}


@pytest.fixture(scope="module")
def model():
    return tt.load_model(tiny.long_directory(), device="cpu")


@pytest.fixture(scope="module")
def result(model):
    own = {"own": [tiny.story(index) for index in range(4)]}
    return tt.battery(model, sets=own, seed=3, show_progress=False, **SMALL)


def shares(scores, stories):
    """Right answers of each task and subset, question by question."""
    found = {}
    for row in scores.frame.itertuples():
        question = next(s for s in stories if s.id == row.story_id).questions[row.question]
        subset = {
            "reality": ("reality", "all"),
            "memory": ("memory", "all"),
            "second_order": ("second_order", "true_belief" if question.true_belief else "false_belief"),
        }.get(question.category, ("belief", question.category))
        found.setdefault(subset, []).append(bool(row.correct))
    return found


def test_accuracies_are_those_of_score_stories(model, result):
    frame = result.frame.set_index(["task", "subset"])
    stories = tt.generate_stories(6, seed=3, split="test")
    scores = tt.score_stories(model, stories, show_progress=False)
    expected = shares(scores, stories)
    assert {task for task, _ in expected} == {"belief", "second_order", "reality", "memory"}
    for key, right in expected.items():
        assert (frame.n[key], frame.score[key]) == (len(right), np.mean(right)), key
    pictures = tt.score_stories(model, tt.generate_photographs(6, seed=3, split="test"), show_progress=False)
    for row in pictures.accuracy().itertuples():
        assert frame.score["photograph", row.category] == row.accuracy
        assert frame.low["photograph", row.category] == row.low
    for task, make in (("key_value", tt.key_value_stories), ("induction", tt.induction_stories)):
        items = make(model, 3, distances=(64, 128), seed=3)
        for row in tt.score_stories(model, items, show_progress=False).accuracy(["condition"]).itertuples():
            assert (frame.n[task, row.condition], frame.score[task, row.condition]) == (3, row.accuracy)
            assert frame.chance[task, row.condition] == 0.25
    for about, some in (("belief", scores), ("photograph", pictures)):
        paired = some.paired(kind=about).set_index("subset").loc["false_belief_stories"]
        for column, name in (("n", "n"), ("score", "accuracy"), ("chance", "chance"), ("high", "high")):
            assert frame[column][about, "paired"] == paired[name]
    own = tt.score_stories(model, [tiny.story(i) for i in range(4)], show_progress=False).accuracy()
    for row in own.itertuples():
        assert (frame.n["own", row.category], frame.score["own", row.category]) == (row.n, row.accuracy)
    tasks = list(dict.fromkeys(result.frame.task))
    assert tasks == [*TASKS, "own"]


def test_perplexity_by_kind(model, result):
    frame = result.frame.set_index(["task", "subset"])
    for kind, kinds in (
        ("prose", ("description", "fact")),
        ("patterns", ("counting", "lookup", "repetition")),
    ):
        texts = tt.generate_texts(12, seed=3, split="test", kinds=kinds)
        samples = tt.text_samples(model, texts, n=3, length=128, seed=3)
        assert frame.score["perplexity", kind] == pytest.approx(
            tt.perplexity(model, samples, show_progress=False).value
        )
        low, high = frame.low["perplexity", kind], frame.high["perplexity", kind]
        assert low <= frame.score["perplexity", kind] <= high
        assert pd.isna(frame.above_chance["perplexity", kind])
    given = tt.battery(
        model, tasks=["perplexity"], texts={"mine": "Sally puts the ball in the box. " * 200}, n_windows=4
    )
    assert given.frame.subset.tolist() == ["mine"]
    assert given.frame.n.tolist() == [4]


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_items_on_either_kind_of_model(backend):
    """Every margin and every loss from unpadded forward passes in float64."""
    model, hf, tokenizer = tiny.model(backend=backend), tiny.hf_model(), tiny.build_tokenizer()
    stories = [tiny.story(index) for index in range(3)]
    items = tt.battery(
        model,
        tasks=["perplexity"],
        texts={"mine": "Sally puts the ball in the box. " * 60},
        n_windows=2,
        sets={"own": stories},
        show_progress=False,
    ).items
    windows = tt.text_samples(model, "Sally puts the ball in the box. " * 60, n=2, length=128)
    losses = [oracles.sample_loss(hf, windows, n).item() * 127 for n in range(2)]
    np.testing.assert_allclose(items[items.task == "perplexity"].value, losses, rtol=1e-5)
    margins = items.dropna(subset="margin").set_index("item").margin
    assert len(margins) == 15
    for story in stories:
        for index, question in enumerate(story.questions):
            prompt = [1, *tokenizer(story.prompt(question))["input_ids"]]
            scores = {}
            for option in question.options:
                answer = tokenizer(f" {option}")["input_ids"]
                log_probs = oracles.logits(hf, torch.tensor(prompt + answer)).log_softmax(-1)
                places = enumerate(answer, start=len(prompt) - 1)
                scores[option] = sum(float(log_probs[place, token]) for place, token in places)
            right = scores.pop(question.answer)
            expected = right - max(scores.values())
            assert margins[f"{story.id}:{index}"] == pytest.approx(expected, abs=2e-4)


def test_a_score_is_the_ratio_of_its_items(result):
    for row in result.frame.itertuples():
        items = result.items
        items = items[(items.task == row.task) & (items.subset == row.subset)]
        score = items.value.sum() / items.weight.sum()
        assert row.score == pytest.approx(np.exp(score) if row.measure == "perplexity" else score)
        assert (row.n, row.groups) == (len(items), items.group.nunique())
    assert not result.items.duplicated(["task", "subset", "item"]).any()
    twins = result.items[(result.items.task == "belief") & (result.items.subset != "paired")]
    assert twins.group.nunique() == 3  # six stories, twins together
    # Where a margin is known, it says what is right.
    known = result.items.margin.notna()
    assert ((result.items.margin > 0) == (result.items.value > 0))[known].all()


def test_the_same_arguments_give_the_same_numbers_and_edits_show(model, result):
    prepared = tt.prepare_battery(model, sets={"own": [tiny.story(i) for i in range(4)]}, seed=3, **SMALL)
    again = prepared.measure(model)
    pd.testing.assert_frame_equal(again.frame, result.frame)
    pd.testing.assert_frame_equal(again.items, result.items)
    samples = tt.story_samples(model, tt.generate_stories(4, split="train"))
    mask = tt.top_fraction(tt.fisher_diagonal(model, samples, show_progress=False), 0.3)
    with tt.SparseEdit.zero(model, mask).applied(model):
        inside = prepared.measure(model)
        scores = tt.score_stories(model, tt.generate_stories(6, seed=3, split="test"), show_progress=False)
    assert inside.items.item.tolist() == result.items.item.tolist()
    margins = inside.items[inside.items.task == "reality"].set_index("item").margin
    real = scores.frame[scores.frame.category == "reality"]
    expected = pd.Series(real.margin.to_numpy(), index=real.story_id + ":" + real.question.astype(str))
    np.testing.assert_allclose(margins[expected.index], expected, atol=1e-5)
    assert np.abs(inside.items.margin - result.items.margin).max() > 0.1
    pd.testing.assert_frame_equal(prepared.measure(model).items, result.items)
    packed = tt.prepare_battery(
        model, sets={"own": [tiny.story(i) for i in range(4)]}, seed=3, pack=True, **SMALL
    )
    assert packed.digest == prepared.digest
    np.testing.assert_allclose(packed.measure(model).items.margin, result.items.margin, atol=1e-3)
    assert prepared.digest != tt.prepare_battery(model, seed=4, **SMALL).digest


def test_the_gate_says_what_is_not_above_chance():
    """Somebody who always names where things are: all of true beliefs, none of false ones, no pair."""
    rows = []
    for i in range(40):
        for subset, value, chance in (
            ("false_belief", 0.0, 0.5),
            ("true_belief", 1.0, 0.5),
            ("paired", 0.0, 0.25),
            ("guess", float(i % 4 == 0), 0.25),
        ):
            rows.append(("belief", subset, "accuracy", f"{i}", f"{i}", value, 1.0, np.nan, chance))
    columns = "task subset measure item group value weight margin chance".split()
    table = score_table(pd.DataFrame(rows, columns=columns), seed=0).set_index("subset")
    assert table.above_chance.to_dict() == {
        "false_belief": False,
        "true_belief": True,
        "paired": False,
        "guess": False,
    }
    assert table.low["guess"] == pytest.approx(beta.ppf(0.025, 10, 31))
    assert table.high["guess"] == pytest.approx(beta.ppf(0.975, 11, 30))


def test_the_interval_of_a_perplexity_draws_windows():
    nll = np.array([120.0, 250.0, 180.0, 300.0, 90.0])
    items = pd.DataFrame(
        {
            "task": "perplexity",
            "subset": "x",
            "measure": "perplexity",
            "item": list("abcde"),
            "group": list("abcde"),
            "value": nll,
            "weight": 100.0,
            "margin": np.nan,
            "chance": np.nan,
        }
    )
    row = score_table(items, seed=0).iloc[0]
    assert row.score == pytest.approx(np.exp(nll.sum() / 500))
    draws = np.random.default_rng(1).choice(nll, (20_000, 5)).mean(1) / 100
    assert row.low == pytest.approx(np.exp(np.quantile(draws, 0.025)), rel=0.03)
    assert row.high == pytest.approx(np.exp(np.quantile(draws, 0.975)), rel=0.03)


def test_the_embedded_model_cannot_do_false_photographs():
    model = tt.load_model(device="cpu")
    frame = tt.battery(model, tasks=["photograph"], n=40, show_progress=False).frame.set_index("subset")
    assert frame.above_chance.to_dict() == {
        "reality": True,
        "memory": True,
        "false_photograph": False,
        "true_photograph": True,
        "paired": False,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ["beliefs"]}, "tasks='beliefs' is not one of 'belief'"),
        ({"tasks": []}, "no task to measure"),
        ({"sets": {"belief": []}}, "the name 'belief'"),
        ({"sets": {"empty": []}, "tasks": []}, "No question to score"),
        ({"tasks": ["perplexity"], "texts": {"few": "One word."}}, r"texts\['few'\]: The text has"),
        ({"tasks": ["key_value"], "distances": (5000,)}, "must be from 16 to 896"),
        ({"n_windows": 0}, "n_windows=0"),
    ],
)
def test_what_cannot_be_asked_is_refused(model, arguments, message):
    with pytest.raises(TomsparseError, match=message):
        tt.battery(model, **arguments)


def test_a_model_in_training_mode_is_refused():
    model = tiny.model(dtype=torch.float32).train()
    with pytest.raises(TomsparseError, match="training mode"):
        tt.battery(model)
