"""A study of one's own stories: what is made of them, what is left out, what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tl_tomsparse as tt
from tests import tiny
from tests.test_study import evidence
from tl_tomsparse import _study_processes, localisation
from tl_tomsparse._folder import read_points
from tl_tomsparse._model import view
from tl_tomsparse._study_material import make_material
from tl_tomsparse._study_stories import CHUNKS, generated_set, own_set, parts, settings_of
from tl_tomsparse.stories.story import Story

Stories = dict[str, list[Story]]
SMALL = tt.StudySettings(
    windows=10, length=48, random_masks=1, tune_steps=2, kappa=0.02, n_draws=200, head_stories=1,
    localisation_items=0,
)  # fmt: skip


def own_stories() -> Stories:
    """Short stories by hand, twins in one group; only the train stories ask nothing of second order."""
    made = {"train": range(24), "dev": range(100, 104), "test": range(200, 206)}
    stories = {
        split: [
            replace(
                tiny.story(i),
                id=f"own-{i}",
                group=f"pair-{i // 2}",
                scenario="handmade",
                split="",
                text=f"Today is day {i}. {tiny.story(i).text}",
            )
            for i in numbers
        ]
        for split, numbers in made.items()
    }
    stories["train"] = [
        replace(s, questions=tuple(q for q in s.questions if q.order < 2)) for s in stories["train"]
    ]
    return stories


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(localisation, "_LONGEST", 128)  # the tiny model's context is long
        yield tt.load_model(tiny.long_directory(), device="cpu")


@pytest.fixture(scope="module")
def finished(model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[tt.Study, Path]:
    """A study that was stopped on its way."""
    out = tmp_path_factory.mktemp("own") / "study"

    def stop(message: str) -> None:
        if message.startswith("Training"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tt.study(model, out, SMALL, stories=own_stories(), progress=stop, show_progress=False)
    return tt.study(model, out, SMALL, stories=own_stories(), show_progress=False), out


def test_parts_have_no_group_in_common_and_nothing_is_lost(model: Any) -> None:
    own = own_stories()
    found = parts(own["train"])
    assert sorted(story.id for part in found for story in part) == sorted(s.id for s in own["train"])
    groups = [{story.group for story in part} for part in found]
    assert all(not a & b for i, a in enumerate(groups) for b in groups[:i])
    assert {len(group) for group in groups} <= {1, 2}
    made = generated_set(model, tt.StudySettings(stories=40, dev_stories=2, test_stories=2)).task
    assert [[s.id for s in part] for part in parts(made)] == [
        [s.id for j, s in enumerate(made) if j // 2 % CHUNKS == i] for i in range(CHUNKS)
    ]  # generated twins come one after the other


def test_only_ones_own_stories_are_asked(model: Any) -> None:
    own = own_stories()
    settings = settings_of(own, SMALL)
    material = make_material(model, settings, own)
    ids = {split: {story.id for story in some} for split, some in own.items()}
    counts: dict[str, int] = {}
    for name, samples in material.tasks.items():
        if name in ("general", "counting", "key_value"):
            continue
        assert {i.split(":")[0] for i in samples.ids} <= ids["train"], name
        counts[name] = len(samples)
    n_false = sum(q.category == "false_belief" for s in own["train"] for q in s.questions)
    assert sum(counts[f"part_{i}"] for i in range(CHUNKS)) == len(material.task) == n_false
    assert counts["last_token"] == counts["wrong_labels"] == n_false
    assert {"true_belief", "reality", "memory"} < counts.keys()
    missing = {"second_order", "false_photograph"}
    missing |= {"transfer", "contents", "new_wording", "other_stories"}
    assert material.left_out.keys() == missing
    assert not (missing | {"other_stories", "new_wording"}) & material.tasks.keys()
    assert set(material.scoring.questions.story_id) == ids["test"]
    assert len(material.scoring.questions) == sum(len(s.questions) for s in own["test"])
    assert {story.id for story in material.dev} == ids["dev"]


def test_what_ones_own_stories_do_not_give_is_not_testable(finished: tuple[tt.Study, Path]) -> None:
    study, out = finished
    families = set(study.arms.family)
    assert {"mask", "key_value", "counting", "wrong_labels", "reality", "tuned", "rescue_0.5"} < families
    assert not {"second_order", "false_photograph", "transfer", "new_wording"} & families
    assert study.facts["n_stories"] == 6
    assert study.facts["n_groups"] == 3
    assert study.facts["settings"]["stories"] == 24
    assert study.battery.obstacle is not None
    assert study.battery.obstacle in (out / "study.html").read_text()
    assert study.heads.claims
    found = {claim.claim: claim for claim in study.claims}
    assert found["more_than_second_order"].status == found["transfers_to_contents"].status == "not testable"


def test_claims_about_what_was_left_out_say_why() -> None:
    left_out = dict(own_set(own_stories()).left_out)
    found = evidence(left_out=left_out)
    assert {name for name, claim in found.items() if claim.status == "not testable"} == {
        "more_than_second_order", "more_than_false_photograph",
        "transfers_to_transfer", "transfers_to_contents", "transfers_from_wordings", "seeds_agree",
    }  # fmt: skip
    assert "your own and have no second order question" in found["more_than_second_order"].sentence
    assert "your own, not generated ones of transfer" in found["transfers_to_contents"].sentence
    assert evidence()["more_than_second_order"].status == "supported"


def test_a_finished_study_of_these_stories_goes_on_with_no_others(
    model: Any, finished: tuple[tt.Study, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, out = finished

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("finished work was done again")

    monkeypatch.setattr(tt.SparseEdit, "applied", never)
    again = tt.study(model, out, SMALL, stories=own_stories(), show_progress=False)
    assert str(again.claims) == str(study.claims)
    with pytest.raises(tt.TomsparseError, match=r"holds another run.*own_stories"):
        tt.study(model, out, replace(SMALL, stories=24, dev_stories=4, test_stories=6), show_progress=False)
    regrouped = own_stories()
    regrouped["test"] = [replace(story, group="") for story in regrouped["test"]]  # the same tokens
    with pytest.raises(tt.TomsparseError, match=r"holds another run.*own_stories"):
        tt.study(model, out, SMALL, stories=regrouped, show_progress=False)


def test_another_process_measures_the_same(
    model: Any, finished: tuple[tt.Study, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out = finished
    for path in out.glob("sensitivity_*.safetensors"):
        shutil.copy(path, tmp_path)
    lines = (out / "points.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "points.jsonl").write_bytes(b"".join(lines[:-6]))  # the last two are of trained weights
    monkeypatch.setattr(_study_processes.torch, "set_num_threads", lambda _: None)
    own = pickle.loads(pickle.dumps(own_stories()))
    settings, fingerprint = settings_of(own, SMALL), view(model).identity().fingerprint
    samples = json.loads((out / "run.json").read_text())["samples"]
    other = _study_processes.make_job(lambda: model, settings, tmp_path, fingerprint, "other", own)
    with pytest.raises(tt.TomsparseError, match="another tokenizer, or texts have changed"):
        _study_processes._work(0, other, 1)
    job = _study_processes.make_job(lambda: model, settings, tmp_path, fingerprint, samples, own)
    job.kappa.value = 0.02
    with monkeypatch.context() as patch:
        patch.setattr(_study_processes, "_alone", lambda: True)
        _study_processes._work(0, job, 1)
    assert not (tmp_path / "points_0.jsonl").exists()
    assert {turn.value for turn in job.turns.values()} <= {0, 1}
    job = _study_processes.make_job(lambda: model, settings, tmp_path, fingerprint, samples, own)
    job.kappa.value = 0.02
    _study_processes._work(0, job, 1)
    expected = {record["key"]: record for record in read_points(out / "points.jsonl")}
    found = read_points(tmp_path / "points_0.jsonl")
    assert len(found) == 6
    assert all(expected[record["key"]] == record for record in found)


def test_what_interrupted_processes_had_taken_is_not_waited_for(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A helper that Ctrl-C has ended is no failure; nothing of its work will come."""
    job = _study_processes.make_job(lambda: model, SMALL, tmp_path, "", "", None)
    helpers = _study_processes.Helpers(job, 2, False)
    monkeypatch.setattr(helpers, "_context", SimpleNamespace(join=lambda timeout: True), raising=False)
    monkeypatch.setattr(_study_processes, "_taken", lambda _job, _phase, _items: iter(()))
    helpers.sensitivities(model, make_material(model, SMALL))
    assert not list(tmp_path.iterdir())


def spoil(change: Callable[[Stories], Any]) -> Stories:
    own = own_stories()
    change(own)
    return own


def without(split: str) -> Callable[[Stories], Any]:
    def change(own: Stories) -> None:
        own[split] = [
            replace(s, questions=tuple(q for q in s.questions if q.category != "false_belief"))
            for s in own[split]
        ]

    return change


def first(of: str, **fields: Any) -> Callable[[Stories], Any]:
    return lambda own: own[of].__setitem__(0, replace(own[of][0], **fields))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda own: own.pop("dev"), r"\['test', 'train'\]; pass a dictionary"),
        (without("dev"), r"stories\['dev'\] has 4 stories and no false-belief question"),
        (without("test"), r"stories\['test'\] has 6 stories and no false-belief"),
        (lambda own: own["train"].clear(), r"stories\['train'\] has 0 stories"),
        (first("train", split="test"), "'own-0' is of the split 'test'"),
        (first("dev", split="test"), "'own-100' is of the split 'test'"),
        (first("test", split="dev"), "'own-200' is of the split 'dev'"),
        (first("test", group="pair-3"), r"'own-200' of stories\['test'\] has the same group .*'train'"),
        (first("test", id="own-5"), r"'own-5' of stories\['test'\] has the same id"),
        (first("dev", group="own-200", id="own-200"), "the same id"),
        (first("test", text=f"Today is day 1. {tiny.story(1).text}"), "has the same text"),
        (first("test", text=f"Today is day 1.  {tiny.story(1).text} "), "has the same text"),
        (
            first("train", questions=(replace(tiny.story(0).questions[0], options=("basket", "basket")),)),
            r"'own-0' of stories\['train'\] asks .* with the options \('basket', 'basket'\)",
        ),
        (first("train", id="own-1"), r"stories\['train'\] has two stories with the id 'own-1'"),
        (lambda own: own["train"].__delitem__(slice(14, None)), "stories=14 must be at least 16"),
        (lambda own: own["train"].append("Sally"), "stories has a str"),
    ],
)
def test_stories_that_would_spoil_a_claim_are_refused_before_any_work(
    model: Any, tmp_path: Path, change: Callable[[Stories], Any], words: str
) -> None:
    with pytest.raises(tt.TomsparseError, match=words):
        tt.study(model, tmp_path / "x", SMALL, stories=spoil(change), show_progress=False)
    assert not (tmp_path / "x").exists()


def test_too_few_groups_are_refused(model: Any, tmp_path: Path) -> None:
    own = own_stories()
    own["train"] = [replace(s, group=f"pair-{i % 7}") for i, s in enumerate(own["train"])]
    with pytest.raises(tt.TomsparseError, match="are 7 groups, and at least 8 are needed"):
        tt.study(model, tmp_path / "x", SMALL, stories=own, show_progress=False)
    with pytest.raises(tt.TomsparseError, match="stories is list; pass a dictionary"):
        tt.study(model, tmp_path / "x", SMALL, stories=own["train"], show_progress=False)  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()
