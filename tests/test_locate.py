"""The whole search on planted score functions, on a transformer made by hand, and where nothing is there."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny
import torch

import tl_tomsparse as tt
from tl_tomsparse import _head_search as search
from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._head_tables import change_table
from tl_tomsparse._model import view
from tl_tomsparse._study_heads import study_heads
from tl_tomsparse.heads import KnockoutMeter
from tl_tomsparse.locate import locate_heads

GRID = [(layer, head) for layer in range(8) for head in range(8)]
FEW = {"heads": GRID, "n_pilot": 30, "step": 30, "most": 150, "max_heads": 3}


class Planted:
    """Additive effects with one interaction, and noise that is the same for the same heads."""

    heads = tuple(GRID)
    name = "planted score"

    def __init__(self, effects, *, interaction=0.0, noise=0.0, seed=0):
        self.effects, self.interaction, self.noise, self.seed = effects, interaction, noise, seed
        self.n = 0

    def __call__(self, out):
        self.n += len(out)
        values = 4.0 + out @ np.array([self.effects.get(column, 0.0) for column in range(64)])
        values = values + self.interaction * (out[:, 3] & out[:, 20])
        for index, row in enumerate(out if self.noise else []):
            bits = [self.seed, *np.packbits(row).tolist()]
            values[index] += self.noise * np.random.default_rng(bits).standard_normal()
        return values


def test_planted_heads_are_located_confirmed_and_compared():
    meter = Planted({3: -1.5, 20: -1.2, 50: -0.8}, interaction=0.3, noise=0.05)
    test = Planted({3: -1.5, 20: -1.2, 50: -0.8}, interaction=0.3, noise=0.05, seed=1)
    found = locate_heads(meter, test=test, **FEW)
    assert found.heads == ((0, 3), (2, 4), (6, 2))
    assert [claim.status for claim in found.claims] == ["supported"] * 3
    assert found.effects.enough
    path = found.path
    assert path["head"].tolist() == ["", "L0H3", "L2H4", "L6H2"]
    np.testing.assert_allclose(path.score, [4.0, 2.5, 1.6, 0.8], atol=0.25)
    np.testing.assert_allclose(path.test_score, [4.0, 2.5, 1.6, 0.8], atol=0.25)
    assert (path.random_low <= path.random).all()
    assert (path.random[1:] > path.score[1:] + 0.5).all()
    pairs = found.interactions.set_index(["a", "b"])
    assert pairs.loc[("L0H3", "L2H4")].interaction == pytest.approx(0.3, abs=0.2)
    assert pairs.loc[("L0H3", "L6H2")].interaction == pytest.approx(0.0, abs=0.2)
    methods = found.methods.set_index("method")
    assert list(methods.index) == [
        "compressed sensing", "each head alone", "greedy search", "Thompson sampling", "random heads",
    ]  # fmt: skip
    assert methods.score["greedy search"] == pytest.approx(methods.score["compressed sensing"])
    assert methods.n_measurements["each head alone"] == 64
    assert methods.n_measurements["greedy search"] == 64 + 63 + 62
    assert methods.test_score["random heads"] > methods.test_score["compressed sensing"] + 1
    change = found.test.set_index("comparison").value
    assert change["change"] == pytest.approx(path.test_score[3] - path.test_score[0])
    assert change["beyond random"] == pytest.approx(path.test_score[3] - path.test_random[3])
    counts = found.meta["n_measurements"]
    assert methods.n_measurements["compressed sensing"] == (
        counts["pilot"] - 30 + counts["measured"] + 1 + counts["confirm"]
    )
    assert "L0H3, L2H4, L6H2" in found.claims[0].sentence
    assert found.to_frame().found.sum() == 3


def test_noise_and_constant_scores_find_nothing_and_say_so():
    noise = locate_heads(Planted({}, noise=1.0), **FEW)
    assert noise.heads == ()
    assert [claim.status for claim in noise.claims] == ["not supported", "not testable", "not supported"]
    assert "Nothing found in 150 measurements of 64 heads" in noise.claims[0].sentence
    assert len(noise.test) == 0
    assert noise.methods.method.tolist() == ["each head alone", "random heads"]
    constant = locate_heads(Planted({}), **FEW)
    assert constant.heads == ()
    assert "the same in all 30 measurements" in constant.claims[0].sentence
    assert constant.claims[2].status == "not testable"
    assert len(constant.interactions) == 0


def test_heads_that_help_when_they_are_out_are_found_but_not_located():
    found = locate_heads(Planted({5: 1.0}, noise=0.02), baselines=(), **FEW)
    assert found.effects.found == [(0, 5)]
    assert found.heads == ()
    assert found.claims[0].status == "not supported"
    assert "none of them lowers" in found.claims[0].sentence


def test_the_pilot_takes_small_shares_where_much_out_breaks_everything():
    def broken(out):
        return np.where(out.sum(1) > 5, 0.0, 4.0 - 1.5 * out[:, 3] - out[:, 20] - 0.5 * out[:, 30])

    fragile = locate_heads(broken, baselines=(), **{**FEW, "n_pilot": 60})
    assert fragile.meta["share"] < 0.1
    pilot = fragile.pilot.set_index("n_out")
    assert pilot.r2[13] != pilot.r2[13] or pilot.r2[13] < 0.1  # nothing is left to tell apart
    assert fragile.heads[:2] == ((0, 3), (2, 4))
    given = locate_heads(Planted({3: -1.0}), share=0.1, baselines=(), **FEW)
    assert given.meta["share"] == 0.1
    assert len(given.pilot) == 0
    assert given.meta["n_measurements"]["pilot"] == 0


def test_to_raise_the_score_less_than_random_heads_is_not_to_lower_it():
    """The heads are needed on the prompts they are found on; on others every head is better out."""
    test = Planted({**dict.fromkeys(range(64), 1.0), 3: 0.05, 20: 0.05})
    found = locate_heads(Planted({3: -1.0, 20: -1.0}), test=test, baselines=(), **FEW)
    assert set(found.heads) == {(0, 3), (2, 4)}
    changed = found.test.set_index("comparison")
    assert changed.value["change"] > 0 > changed.value["beyond random"]
    claim = {claim.claim: claim for claim in found.claims}["more_than_random"]
    assert claim.status == "not supported"
    assert claim.sentence.startswith("On other prompts")
    same = Planted({3: -1.0, 20: -1.0})
    flattered = locate_heads(same, test=same, baselines=(), **FEW)
    assert "On the same prompts, which flatters it" in flattered.claims[1].sentence


@pytest.mark.parametrize("backend", tiny.BACKENDS)
def test_a_transformer_in_which_only_three_heads_write_anything(backend):
    model = tiny.model("llama", backend, n_layers=6)
    seen = view(model)
    writing = [(1, 2), (3, 0), (4, 3)]
    for layer in range(6):
        weight = seen.weight((layer, "O"))
        for head in range(4):
            if (layer, head) not in writing:
                weight[head] = 0.0
    stories = [tiny.story(index) for index in range(3)]
    plain = KnockoutMeter(model, stories, show_progress=False)
    kept = {}

    def closeness(scores):
        """0 for the unedited answers, lower the further away."""
        return -np.abs(scores - kept.setdefault("unedited", scores)).mean()

    meter = plain.scoring(closeness)
    meter(np.zeros((1, 24), dtype=bool))
    found = locate_heads(
        meter, test=meter, share=0.1, n_pilot=40, step=40, most=120, max_heads=3, smallest=1e-3
    )
    assert set(found.effects.found) == set(writing)
    assert found.heads
    assert set(found.heads) <= set(writing)
    frame = found.to_frame().set_index(["layer", "head"])
    single = meter(np.eye(24, dtype=bool))
    alone = dict(zip(meter.heads, single))
    assert {head for head, value in alone.items() if value < -1e-6} == set(writing)
    for head in writing:
        assert frame.low[head] < 0
    assert found.claims[0].status == "supported"
    assert set(found.path["head"][1:]) == {f"L{layer}H{head}" for layer, head in writing}
    # The path begins with the head that does most alone.
    strongest = min(alone, key=lambda head: alone[head])
    assert found.path["head"].iloc[1] == f"L{strongest[0]}H{strongest[1]}"
    assert found.path.score.iloc[1] == pytest.approx(float(alone[strongest]), abs=1e-5)
    # all of them out leaves a model whose attention adds nothing
    everything = meter(np.ones((1, 24), dtype=bool))
    assert found.path.score.iloc[-1] == pytest.approx(float(everything[0]), abs=1e-5)


def test_intervals_on_test_prompts_are_by_story():
    meter = KnockoutMeter(tiny.model(), [tiny.story(index) for index in range(6)], show_progress=False)
    random = search.random_orders(8, 2, 19, 0)
    table = change_table(meter, meter.heads, [5, 2], random, 0).set_index("comparison")
    items = meter.items(search.sets([[], [5, 2], *random], 8))
    change = items[1] - items[0]
    row = table.loc["change"]
    assert row.value == pytest.approx(change.mean())
    by_story = change.reshape(6, 5).mean(1)
    drawn = by_story[np.random.default_rng(1).integers(0, 6, (20_000, 6))].mean(1)
    assert row.low == pytest.approx(np.quantile(drawn, 0.025), abs=0.1 * drawn.std())
    assert row.high == pytest.approx(np.quantile(drawn, 0.975), abs=0.1 * drawn.std())
    beyond = table.loc["beyond random"]
    assert beyond.value == pytest.approx((items[1] - items[2:].mean(0)).mean())
    assert beyond.as_low == (items[2:].mean(1) <= items[1].mean()).sum()
    assert len(change_table(meter, meter.heads, [], random, 0)) == 0


def test_searches_find_what_brute_force_finds():
    meter = Planted({3: -1.5, 20: -1.2, 50: -0.8})
    assert search.single(meter, 64)[20] == pytest.approx(2.8)
    assert search.greedy(meter, range(64), 64, 3)[0] == [3, 20, 50]
    assert set(search.thompson(meter, 64, 3, 150, 0)) == {3, 20, 50}
    orders = search.random_orders(64, 5, 30, 1)
    assert all(len(set(order)) == 5 for order in orders)
    assert orders == search.random_orders(64, 5, 30, 1)
    assert search.pairs(meter, [3, 20], 64)[3, 20] == pytest.approx((2.5, 2.8, 1.3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": None}, "pass heads="),
        ({"share": 1.2}, "share=1.2"),
        ({"shares": ()}, "shares is empty"),
        ({"n_pilot": 5}, "n_pilot=5"),
        ({"most": 10}, "most=10"),
        ({"baselines": ["ucb"]}, "'ucb'"),
        ({"solver": "svm"}, "'svm'"),
        ({"test": KnockoutMeter}, "other heads"),
    ],
)
def test_refusals(options, message):
    if "test" in options:
        options = {"test": KnockoutMeter(tiny.model(), [tiny.story(0)], show_progress=False)}
    calls = []

    def meter(out):
        calls.append(len(out))
        return np.zeros(len(out))

    with pytest.raises(TomsparseError, match=message):
        locate_heads(meter, **{**FEW, **options})
    assert not calls


def test_so_few_heads_that_there_are_no_ten_sets_are_refused_before_any_measurement():
    calls = []

    def meter(out):
        calls.append(len(out))
        return 4.0 - out[:, 1]

    few = [(0, head) for head in range(6)]
    with pytest.raises(
        TomsparseError, match=r"Of 6 heads there are fewer than 10 different sets.*each alone"
    ):
        locate_heads(meter, heads=few)
    assert not calls
    # Of seven, two of which are out, there are 21 sets: the shares that knock out one are passed over.
    found = locate_heads(meter, heads=[*few, (0, 6)], shares=(0.1, 0.3), n_random=19)
    assert found.pilot.n_out.tolist() == [2]
    assert found.heads == ((0, 1),)


def test_a_study_of_few_heads_says_so_in_place_of_heads(tmp_path):
    model = tiny.model("neox", n_layers=1)
    mask = tt.SparseMask.from_bool(model, {(0, "Q"): torch.zeros(view(model).shape((0, "Q"))).bool()})
    settings = tt.StudySettings(head_stories=2)
    own = {
        split: [dataclasses.replace(tiny.story(n), id=f"{split}{n}") for n in range(2)]
        for split in ("train", "dev", "test")
    }
    found = study_heads(model, mask, settings, own, tmp_path, show_progress=False)
    assert not found.claims
    assert found.obstacle.startswith("Not testable here: Of 4 heads there are fewer than 10 different sets")
