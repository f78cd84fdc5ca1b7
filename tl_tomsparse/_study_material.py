"""What a study is made of: stories and texts, the sensitivity to each task, and the masks that follow.

Every sensitivity is a file of the study's folder as soon as it is finished, and half of one may be there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tl_tomsparse._material import general_texts, stored_sensitivity
from tl_tomsparse._prepared import PreparedScoring, PreparedText, prepare_scoring, prepare_text
from tl_tomsparse._study_stories import CHUNKS, Stories, facts, generated_set, own_set, parts
from tl_tomsparse.mask import SparseMask
from tl_tomsparse.ranking import top_fraction
from tl_tomsparse.samples import Samples, story_samples, text_samples
from tl_tomsparse.sensitivity import Sensitivity
from tl_tomsparse.stories import Story, generate_texts, relabelled

if TYPE_CHECKING:
    from tl_tomsparse._study_settings import StudySettings

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
_OTHERS = (*OTHER_TASKS, *OTHER_LABELS, *OTHER_STORIES)


@dataclass(frozen=True, eq=False)
class Material:
    """Stories and texts as samples.

    Attributes:
        tasks: the samples of each sensitivity, by name; "part_0" ... are parts of the task's.
        task: all of the task's.
        dev: dev stories.
        dev_text: dev text.
        scoring: held-out questions of all kinds.
        prompts: theirs.
        text: held-out text.
        answers: held-out false-belief questions with their answers, for the loss.
        answer_groups: the group of stories that each of `answers` is of; twins are one.
        left_out: controls that the stories do not give, and why.
        digest: of all of it.
    """

    tasks: Mapping[str, Samples]
    task: Samples
    dev: list[Story]
    dev_text: Samples
    scoring: PreparedScoring
    prompts: tuple[str, ...]
    text: PreparedText
    answers: Samples
    answer_groups: NDArray[np.int64]
    left_out: Mapping[str, str]
    digest: str


def make_material(model: Any, settings: StudySettings, own: Stories | None = None) -> Material:
    """Everything that is measured, made and refused before the long work begins."""
    seed, bos = settings.seed, settings.prepend_bos
    stories = generated_set(model, settings) if own is None else own_set(own)

    def some(of: list[Story], *categories: str, **options: Any) -> Samples:
        return story_samples(model, of, categories=categories, prepend_bos=bos, **options)

    texts = general_texts(settings.text, max(settings.windows, 10), settings.length, seed)

    def windows(n: int, split: str) -> Samples:
        return text_samples(model, texts[split], n=n, length=settings.length, prepend_bos=bos, seed=seed)

    task = stories.task
    tasks = {f"part_{i}": some(part, "false_belief") for i, part in enumerate(parts(task))}
    n_samples = sum(map(len, tasks.values()))
    tasks["general"] = windows(settings.windows, "train")
    tasks |= {name: some(of, category) for name, (of, category) in stories.others.items()}
    tasks["key_value"] = some(facts(model, settings.stories, seed, "train"), "other")
    counting = generate_texts(2 * n_samples, seed=seed, split="train", kinds=("counting",))
    tasks["counting"] = text_samples(model, counting, length=settings.length, prepend_bos=bos, seed=seed)
    tasks["wrong_labels"] = some(relabelled(task, "wrong", seed=seed), "false_belief")
    tasks["shuffled_labels"] = some(relabelled(task, "shuffled", seed=seed), "false_belief")
    tasks["last_token"] = some(task, "false_belief", supervise="last_token")
    tasks = {name: samples[: min(len(samples), n_samples)] for name, samples in tasks.items()}
    held_out = [*stories.test, *stories.beside]
    scoring = prepare_scoring(model, held_out, prepend_bos=bos, pack=True)
    text = prepare_text(model, windows(max(10, settings.windows // 4), "test"))
    dev_text = windows(max(10, settings.windows // 4) // 2, "dev")
    answers = some(stories.test, "false_belief")
    digest = blake2b(digest_size=16)
    for samples in (*tasks.values(), dev_text, answers):
        digest.update(prepare_text(model, samples).reads.digest.encode())
    dev_digest = prepare_scoring(model, stories.dev, prepend_bos=bos, pack=True).digest
    digest.update(f"{dev_digest} {scoring.digest} {text.reads.digest}".encode())
    group_of = {story.id: story.group or story.id for story in stories.test}
    _, groups = np.unique([group_of[name.rpartition(":")[0]] for name in answers.ids], return_inverse=True)
    return Material(
        tasks,
        some(task, "false_belief"),
        stories.dev,
        dev_text,
        scoring,
        tuple(story.prompt(question) for story in held_out for question in story.questions),
        text,
        answers,
        groups,
        stories.left_out,
        digest.hexdigest(),
    )


def sensitivity_path(folder: Path, name: str) -> Path:
    """Of the sensitivity to a task."""
    return folder / f"sensitivity_{name}.safetensors"


def make_sensitivities(
    model: Any,
    material: Material,
    names: Iterable[str],
    settings: StudySettings,
    folder: Path,
    *,
    progress: Callable[[str], None] = lambda _message: None,
    show_progress: bool = False,
) -> None:
    """See that the sensitivities to tasks of these names are in the folder."""
    for name in names:
        samples, path = material.tasks[name], sensitivity_path(folder, name)
        if not path.exists():
            progress(f"Sensitivity to {len(samples)} samples of {name.replace('_', ' ')}")
        stored_sensitivity(model, samples, settings.matrices, path, show_progress=show_progress)


def read_sensitivities(material: Material, folder: Path) -> dict[str, Sensitivity]:
    """All of them, and "task" itself, the mean over its parts."""
    found = {name: Sensitivity.load(sensitivity_path(folder, name)) for name in material.tasks}
    return found | {"task": merged(found, range(CHUNKS))}


def merged(sensitivities: Mapping[str, Sensitivity], parts: range) -> Sensitivity:
    """The sensitivity over some parts of the task's samples."""
    return reduce(Sensitivity.merge, [sensitivities[f"part_{i}"] for i in parts])


def make_masks(sensitivities: Mapping[str, Sensitivity], kappa: float) -> dict[str, SparseMask]:
    """The mask and its controls that are not random, each less the entries of general text; "tom_only" is the
    mask with these.
    """
    general = top_fraction(sensitivities["general"], kappa)
    task = top_fraction(sensitivities["task"], kappa)
    masks = {"mask": task - general, "general_only": general, "tom_only": task}
    masks["lowest"] = lowest(sensitivities["task"], masks["mask"])
    for name in _OTHERS:
        if name not in sensitivities:  # one's own stories do not give all of them
            continue
        masks[name] = top_fraction(sensitivities[name], kappa) - general
    return masks


def n_masks(material: Material) -> int:
    """How many masks are made: those of `material.tasks`, and four that are made of several."""
    return 4 + len(set(material.tasks) & set(_OTHERS))


def lowest(sensitivity: Sensitivity, like: SparseMask) -> SparseMask:
    """As many entries of each matrix as a mask has, those of the smallest sensitivity."""
    entries = {
        key: sensitivity[key].flatten().sort(stable=True).indices[: len(index)]
        for key, index in like.entries.items()
    }
    return SparseMask(like.identity, like.shapes, entries)
