"""The section of a study on localisation and kinds of text: planted answers, a real model, resuming."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import tl_tomsparse as tt
from tests import tiny
from tl_tomsparse import _study_battery, localisation
from tl_tomsparse._battery_claims import battery_claims, changes_of
from tl_tomsparse._intervals import ClusterBootstrap
from tl_tomsparse._model import view
from tl_tomsparse._study_arms import Arm, given, make_arms
from tl_tomsparse._study_battery import _TASKS, battery_section, measure_arms, study_battery
from tl_tomsparse.edit import SparseEdit
from tl_tomsparse.study_report import _localisation

SETTINGS = tt.StudySettings(n_draws=2000)
DISTANCES, GROUPS, WINDOWS = ("16", "32", "64"), 40, 30
ABLE = {"key_value": 0.95, "induction": 0.9}
N_RANDOM = 5


class Planted:
    """Items that are right at given rates, and windows that cost what is given."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        rows: list[dict[str, Any]] = []
        for task in ABLE:
            for distance in DISTANCES:
                rows += [
                    {"task": task, "subset": distance, "measure": "accuracy", "item": f"{task}{i}-{distance}",
                     "group": f"{task}{i}", "weight": 1.0, "margin": np.nan, "chance": 0.25}
                    for i in range(GROUPS)
                ]  # fmt: skip
        for kind in ("prose", "patterns"):
            rows += [
                {"task": "perplexity", "subset": kind, "measure": "perplexity", "item": f"{kind} {i}",
                 "group": f"{kind} {i}", "weight": 127.0, "margin": np.nan, "chance": np.nan}
                for i in range(WINDOWS)
            ]  # fmt: skip
        self.frame = pd.DataFrame(rows)
        self.luck = self.rng.random(len(rows))  # the same in every arm: an edit changes few answers
        self.nll = 127 * (2 + 0.3 * self.rng.standard_normal(len(rows)))

    def items(self, rates: dict[str, float], costs: dict[str, float] | None = None) -> pd.DataFrame:
        rate = self.frame.task.map(ABLE | rates).to_numpy(float)
        flip = self.rng.random(len(rate)) < 0.01
        cost = self.frame.subset.map(costs or {}).fillna(1.0).to_numpy(float)
        nll = self.nll + 127 * (np.log(cost) + 0.01 * self.rng.standard_normal(len(cost)))
        value = np.where(self.frame.task == "perplexity", nll, (self.luck < rate) ^ flip)
        return self.frame.assign(value=value.astype(float))


def arms_of(
    mask: dict[str, float],
    *,
    before: dict[str, float] | None = None,
    random: dict[str, float] | None = None,
    costs: dict[str, float] | None = None,
    n_random: int = N_RANDOM,
) -> dict[str, list[pd.DataFrame]]:
    planted, usual = Planted(), before or {}
    return {
        "before": [planted.items(usual)],
        "mask": [planted.items(usual | mask, costs)],
        "general_only": [planted.items(usual)],
        "random_matrix": [planted.items(usual | (random or {})) for _ in range(n_random)],
    }


def claims_of(items: dict[str, list[pd.DataFrame]], n_weights: int = 40) -> dict[str, Any]:
    changes = changes_of(items, n_draws=SETTINGS.n_draws, seed=0)
    claims = battery_claims(items, changes, n_weights, SETTINGS)
    assert all(claim.sentence.endswith(".") and "nan" not in claim.sentence for claim in claims)
    return {claim.claim: claim for claim in claims}


def statuses(items: dict[str, list[pd.DataFrame]], **options: Any) -> list[str]:
    return [claim.status for claim in claims_of(items, **options).values()]


def test_an_edit_that_destroys_recall_alone_is_said_to() -> None:
    found = claims_of(arms_of({"key_value": 0.4}))
    assert list(found) == ["key_value_falls", "induction_falls", "prose_stays", "patterns_stays"]
    assert [claim.status for claim in found.values()] == [
        "supported", "not supported", "supported", "supported",
    ]  # fmt: skip
    fall = found["key_value_falls"]
    assert fall.low < fall.value < fall.high < 0
    assert fall.value == pytest.approx(-0.55, abs=0.1)
    assert "120 items at 16 to 64 tokens" in fall.sentence
    assert "contextual localisation" in fall.paper
    assert found["patterns_stays"].paper == "not asked"


def test_an_edit_that_does_nothing_supports_no_fall() -> None:
    found = arms_of({})
    assert statuses(found) == ["not supported", "not supported", "supported", "supported"]


def test_random_masks_that_do_the_same_are_no_support() -> None:
    both = {"key_value": 0.4, "induction": 0.3}
    assert statuses(arms_of(both, random=both))[:2] == ["not supported", "not supported"]
    assert statuses(arms_of(both))[:2] == ["supported", "supported"]


def test_a_model_that_guesses_has_nothing_to_damage() -> None:
    found = claims_of(arms_of({"key_value": 0.0}, before={"key_value": 0.27}))
    assert [claim.status for claim in found.values()][:2] == ["not testable", "not supported"]
    assert "chance 25.0 %" in found["key_value_falls"].sentence


def test_few_random_masks_and_an_empty_mask_are_not_testable() -> None:
    few = claims_of(arms_of({"key_value": 0.4}, n_random=4))
    assert [claim.status for claim in few.values()] == ["not testable"] * 2 + ["supported"] * 2
    assert "at least 5" in few["induction_falls"].sentence
    assert statuses(arms_of({}), n_weights=0) == ["not testable"] * 4


def test_each_kind_of_text_has_a_claim_of_its_own() -> None:
    found = claims_of(arms_of({}, costs={"prose": 1.3}))
    assert [found[name].status for name in ("prose_stays", "patterns_stays")] == [
        "not supported",
        "supported",
    ]
    assert found["prose_stays"].value == pytest.approx(1.3, abs=0.02)


def test_the_claims_are_one_family() -> None:
    """The smallest of four p-values counts four times."""
    items = arms_of({"key_value": 0.4})
    changes = changes_of(items, n_draws=SETTINGS.n_draws, seed=0)
    alone = max(
        changes[comparison, "key_value", "all"].p_below()
        for comparison in ("mask - before", "mask - random_matrix")
    )
    assert claims_of(items)["key_value_falls"].p == pytest.approx(4 * alone)


def test_changes_are_counted_item_by_item_and_drawn_again_by_group() -> None:
    items = arms_of({"key_value": 0.6}, costs={"prose": 1.1})
    arms = [Arm("before", None), Arm("mask", None), Arm("general_only", None)]
    arms += [Arm("random_matrix", seed) for seed in range(N_RANDOM)]
    section = battery_section(arms, [frame for frames in items.values() for frame in frames], SETTINGS)
    table = section.changes.set_index(["comparison", "task", "subset"])
    assert len(table) == 3 * (2 * (len(DISTANCES) + 1) + 2)
    before, mask = items["before"][0], items["mask"][0]
    for subset in (*DISTANCES, "all"):
        gained = []
        for a, b in zip(mask.itertuples(), before.itertuples(), strict=True):
            assert (a.item, a.task, a.subset) == (b.item, b.task, b.subset)
            if a.task == "key_value" and subset in (a.subset, "all"):
                others = [frame.value[a.Index] for frame in items["random_matrix"]]
                gained.append((a.value - b.value, a.value - sum(others) / N_RANDOM, a.group))
        own, beyond = table.loc["mask - before"], table.loc["mask - random_matrix"]
        assert own.value["key_value", subset] == pytest.approx(np.mean([row[0] for row in gained]))
        assert beyond.value["key_value", subset] == pytest.approx(np.mean([row[1] for row in gained]))
        groups = sorted({row[2] for row in gained})
        sums = [sum(row[0] for row in gained if row[2] == group) for group in groups]
        sizes = [sum(row[2] == group for row in gained) for group in groups]
        assert len(groups) == GROUPS
        bootstrap = ClusterBootstrap(GROUPS, n_draws=20_000, seed=7)
        expected = bootstrap.ratio(np.array(sums), np.array(sizes))
        assert own.low["key_value", subset] == pytest.approx(expected.low, abs=0.03)
        assert own.high["key_value", subset] == pytest.approx(expected.high, abs=0.03)
    for kind in ("prose", "patterns"):
        rows = before.subset == kind
        ratio = np.exp((mask.value[rows].sum() - before.value[rows].sum()) / (127 * WINDOWS))
        assert table.value["mask - before", "perplexity", kind] == pytest.approx(ratio)
    scores = section.scores.set_index(["family", "subset"])
    rows = (mask.task == "induction") & (mask.subset == "32")
    found = scores[(scores.task == "induction")].loc[("mask", "32")]
    assert (found.n.item(), found.score.item()) == (GROUPS, mask.value[rows].mean())
    assert section.scores.seed.dropna().unique().tolist() == list(range(N_RANDOM))


# ---- a model


def test_blind_queries_are_found_and_no_change_is_not(tmp_path: Path) -> None:
    """On a model that can recall and go on, short items, under all queries zero and under an edit that writes
    what is there.
    """
    model = tt.load_model(device="cpu")
    prepared = tt.prepare_battery(model, tasks=_TASKS, n_localisation=16, distances=(16, 32), n_windows=10)
    shapes = {key: view(model).shape(key) for key in view(model).keys(("Q",))}
    queries = tt.SparseMask.from_bool(model, {key: torch.ones(shape).bool() for key, shape in shapes.items()})
    edits = SparseEdit.zero(model, queries), SparseEdit.scale(model, queries, 1.0)
    measured = measure_arms(
        model,
        prepared,
        [
            Arm("before", None),
            Arm("mask", None, partial(given, edits[0])),
            Arm("general_only", None, partial(given, edits[1])),
        ],
        tmp_path,
    )
    before, blind, same = measured
    assert (
        blind.value[blind.task == "key_value"].mean() < 0.6 < before.value[before.task == "key_value"].mean()
    )
    for mask, random, falls, stays in (
        ((blind, edits[0]), same, "supported", "not supported"),
        ((same, edits[1]), blind, "not supported", "supported"),
    ):
        arms = [
            Arm("before", None),
            Arm("mask", None, partial(given, mask[1])),
            Arm("general_only", None, partial(given, edits[1])),
        ]
        arms += [Arm("random_matrix", seed) for seed in range(N_RANDOM)]
        section = battery_section(arms, [before, mask[0], same, *[random] * N_RANDOM], SETTINGS)
        found = {claim.claim: claim for claim in section.claims}
        assert [found[name].status for name in ("key_value_falls", "prose_stays", "patterns_stays")] == [
            falls, stays, stays,
        ]  # fmt: skip
        assert (found["induction_falls"].value < -0.1) == (falls == "supported")  # few items of what is hard


@pytest.fixture(autouse=True)
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model's context is long."""
    monkeypatch.setattr(localisation, "_LONGEST", 128)


@pytest.fixture(scope="module")
def small() -> tuple[Any, dict[str, tt.SparseMask], tt.StudySettings]:
    model = tt.load_model(tiny.long_directory(), device="cpu")
    samples = tt.story_samples(model, [tiny.story(index) for index in range(4)])
    general = tt.top_fraction(tt.fisher_diagonal(model, samples[:2], show_progress=False), 0.02)
    task = tt.top_fraction(tt.fisher_diagonal(model, samples, show_progress=False), 0.05)
    settings = tt.StudySettings(
        localisation_items=2, windows=10, random_masks=5, n_draws=200, seed=3, prepend_bos=False
    )
    return model, {"mask": task - general, "general_only": general}, settings


def test_what_is_finished_is_read_again_and_what_has_changed_is_not(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, masks, settings = small
    measured: list[str] = []
    stops = ["stopped"]
    measure = _study_battery._measure

    def counted(model: Any, prepared: Any, arm: Arm) -> pd.DataFrame:
        if stops and arm.seed == 3:
            measured.append(stops.pop())
            raise KeyboardInterrupt
        measured.append(arm.family)
        return measure(model, prepared, arm)

    monkeypatch.setattr(_study_battery, "_measure", counted)
    with pytest.raises(KeyboardInterrupt):
        study_battery(model, masks, settings, tmp_path, show_progress=False)
    assert measured == ["before", "mask", "general_only", "stopped"]
    assert len(list(tmp_path.iterdir())) == 3
    first = study_battery(model, masks, settings, tmp_path, show_progress=False)
    assert measured[4:] == ["random_matrix"] * 5
    again = study_battery(model, masks, settings, tmp_path, show_progress=False)
    assert len(measured) == 9
    pd.testing.assert_frame_equal(again.scores, first.scores)
    pd.testing.assert_frame_equal(again.changes, first.changes)
    assert str(again.claims) == str(first.claims)

    (tmp_path / "battery_general_only.parquet").write_bytes(b"PAR1 cut off")
    other = {**masks, "mask": masks["mask"].random_like(9)}
    study_battery(model, other, settings, tmp_path, show_progress=False)
    # Random masks of the same size are the same masks.
    assert measured[9:] == ["mask", "general_only"]
    del measured[:]
    changed = tt.StudySettings(**{**vars(settings), "localisation_items": 1})
    study_battery(model, other, changed, tmp_path, show_progress=False)
    assert len(measured) == 8
    elsewhere = tt.load_model(tiny.long_directory("neox"), device="cpu")
    one = torch.zeros(view(elsewhere).shape((0, "Q")), dtype=torch.bool)
    one[0, 0, 0] = True
    mask = tt.SparseMask.from_bool(elsewhere, {(0, "Q"): one})
    study_battery(elsewhere, {"mask": mask, "general_only": mask}, changed, tmp_path, False)
    assert len(measured) == 16


def test_the_arms_are_those_of_the_study_on_the_items_of_a_battery(small: Any, tmp_path: Path) -> None:
    model, masks, settings = small
    section = study_battery(model, masks, settings, tmp_path, show_progress=False)
    sensitivity = tt.fisher_diagonal(model, tt.story_samples(model, [tiny.story()]), show_progress=False)
    both = {"task": sensitivity, "general": sensitivity}
    named = {(arm.family, arm.seed): arm.what for arm in make_arms(model, masks, both, 0.02, settings)}
    rows = section.scores.drop_duplicates(["family", "seed"])
    arms = [(row.family, None if pd.isna(row.seed) else row.seed) for row in rows.itertuples()]
    assert arms == [
        ("before", None), ("mask", None), ("general_only", None),
        *(("random_matrix", seed) for seed in range(3, 8)),
    ]  # fmt: skip
    for family, seed in (("before", None), ("mask", None), ("random_matrix", 4)):
        options = {"tasks": ("key_value", "induction", "perplexity"), "n_localisation": 2, "n_windows": 10}
        what = named[family, seed]
        if what is None:
            expected = tt.battery(model, seed=3, prepend_bos=False, show_progress=False, **options).frame
        else:
            with what.applied(model):
                expected = tt.battery(model, seed=3, prepend_bos=False, show_progress=False, **options).frame
        found = section.scores[(section.scores.family == family)]
        found = found[found.seed.isna() if seed is None else found.seed == seed]
        found = found.drop(columns=["family", "seed"]).reset_index(drop=True)
        pd.testing.assert_frame_equal(found, expected)


def test_it_may_be_left_out_and_says_what_keeps_it_from_being_tested(small: Any, tmp_path: Path) -> None:
    model, masks, _ = small
    none = study_battery(model, masks, tt.StudySettings(localisation_items=0), tmp_path, show_progress=False)
    assert none.claims == []
    assert none.obstacle == "Not asked: localisation_items is 0."
    short = tiny.model()  # 128 tokens
    found = study_battery(short, masks, SETTINGS, tmp_path, show_progress=False)
    assert found.obstacle is not None
    assert found.obstacle.startswith("Not testable here: distances=()")
    with pytest.raises(tt.TomsparseError, match="localisation_items=-1"):
        tt.StudySettings(localisation_items=-1).check()


class _WithSection:
    def __init__(self, section: Any) -> None:
        self.battery = section


def test_the_figure_holds_the_scores(small: Any, tmp_path: Path) -> None:
    model, masks, settings = small
    section = study_battery(model, masks, settings, tmp_path, show_progress=False)
    figure = tt.plot.study_localisation(_WithSection(section))  # type: ignore[arg-type]
    lines = [trace for trace in figure.data if trace.fill is None]
    assert [line.name for line in lines] == 2 * ["random masks", "general text alone", "the mask", "unedited"]
    for task, some in (("key_value", lines[:4]), ("induction", lines[4:])):
        table = section.scores[section.scores.task == task]
        mask = table[table.family == "mask"]
        assert list(some[2].x) == [int(subset) for subset in mask.subset]
        assert list(some[2].y) == mask.score.tolist()
        np.testing.assert_allclose(some[2].error_y.array, mask.high - mask.score)
        random = table[table.family == "random_matrix"]
        for x, y, (low, high) in zip(some[0].x, some[0].y, some[0].customdata, strict=True):
            seeds = random[random.subset == str(x)].score
            assert (y, low, high) == (pytest.approx(seeds.mean()), seeds.min(), seeds.max())
    page = _localisation(section.scores)
    found = section.scores[section.scores.family == "random_matrix"]
    recall = found[found.task == "key_value"].groupby("seed").score.mean()
    assert f"<td>{recall.mean():.4g}<small>range {recall.min():.4g} to {recall.max():.4g}</small>" in page
    prose = section.scores[(section.scores.family == "mask") & (section.scores.subset == "prose")].iloc[0]
    assert f"<td>{prose.score:.4g}<small>95 % {prose.low:.4g} to {prose.high:.4g}</small>" in page
    assert {axis.type for axis in (figure.layout.xaxis, figure.layout.xaxis2)} == {"log"}
    assert np.allclose([shape.y0 for shape in figure.layout.shapes], 0.25)
    with pytest.raises(tt.TomsparseError, match="Not asked"):
        tt.plot.study_localisation(_WithSection(_study_battery.BatterySection(obstacle="Not asked.")))  # type: ignore[arg-type]
