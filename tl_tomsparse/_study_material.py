"""What a study is made of: stories and texts, the sensitivity to each task, and the masks that follow.

Every sensitivity is a file of the study's folder as soon as it is finished, and half of one may be there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tl_tomsparse._material import general_texts, stored_sensitivity
from tl_tomsparse._prepared import PreparedScoring, PreparedText, prepare_scoring, prepare_text
from tl_tomsparse.localisation import key_value_stories
from tl_tomsparse.mask import SparseMask
from tl_tomsparse.ranking import rank_entries, top_fraction
from tl_tomsparse.samples import Samples, story_samples, text_samples
from tl_tomsparse.sensitivity import Sensitivity
from tl_tomsparse.stories import Story, generate_photographs, generate_stories, generate_texts, relabelled

if TYPE_CHECKING:
    from tl_tomsparse.study import StudySettings

CHUNKS = 8  # parts of the task's samples, whose sensitivities give halves, quarters and eighths
OTHER_TASKS = (
    "true_belief",
    "reality",
    "memory",
    "second_order",
    "false_photograph",
    "key_value",
    "counting",
)
OTHER_LABELS = ("wrong_labels", "shuffled_labels", "last_token")
OTHER_STORIES = ("other_stories", "transfer", "contents", "new_wording")


@dataclass(frozen=True, eq=False)
class Material:
    """Stories and texts as samples.

    Attributes:
        tasks: the samples of each sensitivity, by name; "part_0" ... are parts of the task's.
        task: all of the task's.
        dev: dev stories.
        dev_text: dev text.
        scoring: held-out questions of all kinds.
        text: held-out text.
        answers: held-out false-belief questions with their answers, for the loss.
        answer_groups: the group of stories that each of `answers` is of; twins are one.
        digest: of all of it.
    """

    tasks: Mapping[str, Samples]
    task: Samples
    dev: list[Story]
    dev_text: Samples
    scoring: PreparedScoring
    text: PreparedText
    answers: Samples
    answer_groups: NDArray[np.int64]
    digest: str


def make_material(model: Any, settings: StudySettings) -> Material:
    """Everything that is measured, made and refused before the long work begins."""
    seed, bos = settings.seed, settings.prepend_bos

    def stories(n: int, split: str, **options: Any) -> list[Story]:
        return generate_stories(n, **{"seed": seed, "split": split, **options})

    def some(of: list[Story], *categories: str, **options: Any) -> Samples:
        return story_samples(model, of, categories=categories, prepend_bos=bos, **options)

    texts = general_texts(settings.text, max(settings.windows, 10), settings.length, seed)

    def windows(n: int, split: str) -> Samples:
        return text_samples(model, texts[split], n=n, length=settings.length, prepend_bos=bos, seed=seed)

    n = settings.stories
    task = stories(n, "train", conditions=("false_belief",))
    mixed = stories(n, "train")
    # Whole stories, and twins together, so that halves share nothing.
    parts = [[s for j, s in enumerate(task) if j // 2 % CHUNKS == i] for i in range(CHUNKS)]
    tasks = {f"part_{i}": some(part, "false_belief") for i, part in enumerate(parts)}
    n_samples = sum(map(len, tasks.values()))
    tasks["general"] = windows(settings.windows, "train")
    for name in ("true_belief", "reality", "memory", "second_order"):
        tasks[name] = some(mixed, name)
    tasks["false_photograph"] = some(generate_photographs(n, seed=seed), "false_photograph")
    tasks["key_value"] = some(_facts(model, n, seed, "train"), "other")
    counting = generate_texts(2 * n_samples, seed=seed, split="train", kinds=("counting",))
    tasks["counting"] = text_samples(model, counting, length=settings.length, prepend_bos=bos, seed=seed)
    tasks["wrong_labels"] = some(relabelled(task, "wrong", seed=seed), "false_belief")
    tasks["shuffled_labels"] = some(relabelled(task, "shuffled", seed=seed), "false_belief")
    tasks["last_token"] = some(task, "false_belief", supervise="last_token")
    others = stories(n, "train", conditions=("false_belief",), seed=seed + 1)
    tasks["other_stories"] = some(others, "false_belief")
    for scenario in ("transfer", "contents"):
        only = stories(n, "train", conditions=("false_belief",), scenarios=(scenario,))
        tasks[scenario] = some(only, "false_belief")
    tasks["new_wording"] = some(
        stories(n, "train", conditions=("false_belief",), wording="new"), "false_belief"
    )
    tasks = {name: samples[: min(len(samples), n_samples)] for name, samples in tasks.items()}
    test = stories(settings.test_stories, "test")
    few = max(1, settings.test_stories // 4)
    held_out = [
        *test,
        *(
            replace(s, id=f"photograph-{s.id}", group=f"photograph-{s.group or s.id}")
            for s in generate_photographs(few, seed=seed, split="test")
        ),
        *_facts(model, max(2, few // 2), seed, "test"),
    ]
    scoring = prepare_scoring(model, held_out, prepend_bos=bos, pack=True)
    text = prepare_text(model, windows(max(10, settings.windows // 4), "test"))
    dev, dev_text = (
        stories(settings.dev_stories, "dev"),
        windows(max(10, settings.windows // 4) // 2, "dev"),
    )
    answers = some(test, "false_belief")
    digest = blake2b(digest_size=16)
    for samples in (*tasks.values(), dev_text, answers):
        digest.update(prepare_text(model, samples).reads.digest.encode())
    dev_digest = prepare_scoring(model, dev, prepend_bos=bos, pack=True).digest
    digest.update(f"{dev_digest} {scoring.digest} {text.reads.digest}".encode())
    group_of = {story.id: story.group or story.id for story in test}
    _, groups = np.unique([group_of[name.rpartition(":")[0]] for name in answers.ids], return_inverse=True)
    return Material(
        tasks, some(task, "false_belief"), dev, dev_text, scoring, text, answers, groups, digest.hexdigest()
    )


def _facts(model: Any, n: int, seed: int, split: str) -> list[Story]:
    """About n look-ups, at the two shortest distances that the tokenizer has room for."""
    made = key_value_stories(model, -(-n // 2), seed=seed, split=split)
    shortest = sorted({int(story.condition) for story in made})[:2]
    return [story for story in made if int(story.condition) in shortest]


def make_sensitivities(
    model: Any,
    material: Material,
    settings: StudySettings,
    folder: Path,
    *,
    progress: Callable[[str], None],
    show_progress: bool,
) -> dict[str, Sensitivity]:
    """The sensitivity to each task and to "task" itself, the mean over its parts; those in the folder are
    read.
    """
    found: dict[str, Sensitivity] = {}
    for name, samples in material.tasks.items():
        path = folder / f"sensitivity_{name}.safetensors"
        if not path.exists():
            progress(f"Sensitivity to {len(samples)} samples of {name.replace('_', ' ')}")
        found[name] = stored_sensitivity(model, samples, settings.matrices, path, show_progress=show_progress)
    return _with_task(found)


def read_sensitivities(material: Material, folder: Path) -> dict[str, Sensitivity]:
    """All of them, from the folder where they are finished."""
    return _with_task(
        {name: Sensitivity.load(folder / f"sensitivity_{name}.safetensors") for name in material.tasks}
    )


def _with_task(found: dict[str, Sensitivity]) -> dict[str, Sensitivity]:
    return found | {"task": merged(found, range(CHUNKS))}


def merged(sensitivities: Mapping[str, Sensitivity], parts: range) -> Sensitivity:
    """The sensitivity over some parts of the task's samples."""
    return reduce(Sensitivity.merge, [sensitivities[f"part_{i}"] for i in parts])


def make_masks(sensitivities: Mapping[str, Sensitivity], kappa: float) -> dict[str, SparseMask]:
    """The mask and its controls that are not random, each less the entries of general text."""
    general = top_fraction(sensitivities["general"], kappa)
    task = top_fraction(sensitivities["task"], kappa)
    masks = {"mask": task - general, "general_only": general}
    masks["lowest"] = lowest(sensitivities["task"], masks["mask"])
    for name in (*OTHER_TASKS, *OTHER_LABELS, *OTHER_STORIES):
        masks[name] = top_fraction(sensitivities[name], kappa) - general
    return masks


def lowest(sensitivity: Sensitivity, like: SparseMask) -> SparseMask:
    """As many entries of each matrix as a mask has, those of the smallest sensitivity."""
    turned = Sensitivity(
        {key: value.max() - value for key, value in sensitivity.items()},
        sensitivity.n_samples,
        sensitivity.identity,
    )
    ranked = rank_entries(turned, kappa_max=1.0)
    entries = {key: ranked.entries[key][: len(like.entries[key])] for key in like.entries}
    return SparseMask(like.identity, like.shapes, entries)
