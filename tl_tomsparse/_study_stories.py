"""The stories of a study: generated ones, or one's own.

Sensitivities come from train stories, kappa and heads from dev stories, and what is reported from held-out
ones, so no two of these may share anything that was drawn together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._points import check_split
from tl_tomsparse.effect import HELD_OUT
from tl_tomsparse.localisation import key_value_stories
from tl_tomsparse.samples import check_stories
from tl_tomsparse.stories import Story, generate_photographs, generate_stories
from tl_tomsparse.stories.story import Category

if TYPE_CHECKING:
    from tl_tomsparse._study_settings import StudySettings

CHUNKS = 8  # parts of the task's stories, whose sensitivities give halves, quarters and eighths
BELIEFS: tuple[Category, ...] = (
    "false_belief",
    "true_belief",
)  # both: a mere bias gains in the one what it loses in the other
_OTHERS: tuple[Category, ...] = ("true_belief", "reality", "memory", "second_order", "false_photograph")
_SCENARIOS = ("transfer", "contents")
_SPLITS = ("train", "dev", "test")

Stories = dict[str, list[Story]]


@dataclass(frozen=True, eq=False)
class StorySet:
    """What is asked in a study.

    Attributes:
        task: train stories with questions about false beliefs.
        others: train stories of each control, and the category of their questions.
        dev, test: stories of these splits.
        beside: held-out items of other tasks.
        left_out: controls that these stories do not give, and why.
    """

    task: list[Story]
    others: Mapping[str, tuple[list[Story], Category]]
    dev: list[Story]
    test: list[Story]
    beside: list[Story] = field(default_factory=list)
    left_out: Mapping[str, str] = field(default_factory=dict)


def generated_set(model: Any, settings: StudySettings) -> StorySet:
    """Stories of the package's own generator, with photographs and look-ups beside them."""
    n, seed = settings.stories, settings.seed

    def false_beliefs(**options: Any) -> list[Story]:
        options = {"seed": seed, "conditions": ("false_belief",), **options}
        return generate_stories(n, split="train", **options)

    mixed = generate_stories(n, seed=seed, split="train")
    others: dict[str, tuple[list[Story], Category]] = {name: (mixed, name) for name in _OTHERS}
    others["false_photograph"] = (generate_photographs(n, seed=seed), "false_photograph")
    others["other_stories"] = (false_beliefs(seed=seed + 1), "false_belief")
    for scenario in _SCENARIOS:
        others[scenario] = (false_beliefs(scenarios=(scenario,)), "false_belief")
    others["new_wording"] = (false_beliefs(wording="new"), "false_belief")
    few = max(1, settings.test_stories // 4)
    beside = [
        replace(story, id=f"photograph-{story.id}", group=f"photograph-{story.group or story.id}")
        for story in generate_photographs(few, seed=seed, split="test")
    ]
    return StorySet(
        false_beliefs(),
        others,
        generate_stories(settings.dev_stories, seed=seed, split="dev"),
        generate_stories(settings.test_stories, seed=seed, split="test"),
        [*beside, *facts(model, max(2, few // 2), seed, "test")],
    )


def own_set(own: Stories) -> StorySet:
    """One's own stories; of the controls those that they ask about."""
    train = own["train"]
    others: dict[str, tuple[list[Story], Category]] = {
        name: (train, name) for name in _OTHERS if asking(train, name)
    }
    left_out: dict[str, str] = {
        name: f"the train stories are your own and have no {name.replace('_', ' ')} question."
        for name in _OTHERS
        if name not in others
    }
    kinds = {name: name for name in _SCENARIOS}
    kinds |= {"other_stories": "another seed", "new_wording": "other wordings"}
    left_out |= {
        name: f"the stories are your own, not generated ones of {kind}." for name, kind in kinds.items()
    }
    return StorySet(asking(train, "false_belief"), others, own["dev"], own["test"], left_out=left_out)


def asking(stories: Sequence[Story], *categories: Category) -> list[Story]:
    """Those that have a question of one of the categories."""
    return [story for story in stories if any(q.category in categories for q in story.questions)]


def belief_stories(settings: StudySettings, split: str, own: Stories | None) -> list[Story]:
    """The few stories on which heads are found ("dev") or measured ("test")."""
    if own is not None:
        return asking(own[split], *BELIEFS)[: settings.head_stories]
    return generate_stories(settings.head_stories, seed=settings.seed + 5, split=split)


def facts(model: Any, n: int, seed: int, split: str) -> list[Story]:
    """About n look-ups, at the two shortest distances that the tokenizer has room for."""
    made = key_value_stories(model, -(-n // 2), seed=seed, split=split)
    shortest = sorted({int(story.condition) for story in made})[:2]
    return [story for story in made if int(story.condition) in shortest]


def parts(stories: Sequence[Story]) -> list[list[Story]]:
    """Stories in `CHUNKS` parts that have no group in common.

    Raises:
        TomsparseError: fewer groups than that.
    """
    place = {name: at for at, name in enumerate(dict.fromkeys(map(_group, stories)))}
    if len(place) < CHUNKS:
        raise TomsparseError(
            f"The train stories with false-belief questions are {len(place)} groups, and at least {CHUNKS} "
            "are needed, since they are divided into as many parts; pass more of them."
        )
    return [[story for story in stories if place[_group(story)] % CHUNKS == i] for i in range(CHUNKS)]


def check_own(stories: Mapping[str, Sequence[Story]]) -> Stories:
    """One's own stories by split, refused where a claim about them would be spoilt.

    Raises:
        TomsparseError: other splits than train, dev and test; something that is no story; no false-belief
            question; stories that were made for another split; two stories of one id; an id, a group or a
            text (but for white space) in two splits; a question without two different options.
    """
    if not isinstance(stories, Mapping) or set(stories) != set(_SPLITS):
        found = sorted(stories) if isinstance(stories, Mapping) else type(stories).__name__
        raise TomsparseError(
            f"stories is {found}; pass a dictionary with the stories of 'train', 'dev' and 'test'."
        )
    own = {split: check_stories(stories[split]) for split in _SPLITS}
    for split, some in own.items():
        if not asking(some, "false_belief"):
            raise TomsparseError(
                f"stories[{split!r}] has {len(some)} stories and no false-belief question; add some."
            )
    chosen = "what is chosen on it is reported on that split; pass other stories"
    check_split(own["train"], ("test",), chosen)
    check_split(own["dev"], ("test",), chosen)
    check_split(own["test"], ("train", "dev"), HELD_OUT)
    ids: set[str] = set()
    seen: dict[tuple[str, str], str] = {}
    for split, some in own.items():
        for story in some:
            if single := next((q for q in story.questions if len(set(q.options)) < 2), None):
                raise TomsparseError(
                    f"Story {story.id!r} of stories[{split!r}] asks {single.text!r} with the options "
                    f"{single.options}; there must be at least two different ones."
                )
            text = " ".join(story.text.split())
            for what, value in (("id", story.id), ("group", _group(story)), ("text", text)):
                if (other := seen.setdefault((what, value), split)) != split:
                    raise TomsparseError(
                        f"Story {story.id!r} of stories[{split!r}] has the same {what} as one of "
                        f"stories[{other!r}]; splits must have nothing in common, so put them into one."
                    )
            if story.id in ids:
                raise TomsparseError(f"stories[{split!r}] has two stories with the id {story.id!r}.")
            ids.add(story.id)
    return own


def settings_of(own: Stories, settings: StudySettings) -> StudySettings:
    """The settings with the numbers of one's own stories."""
    few = (len(asking(own[split], *BELIEFS)) for split in ("dev", "test"))
    return replace(
        settings,
        stories=len(own["train"]),
        dev_stories=len(own["dev"]),
        test_stories=len(own["test"]),
        head_stories=min(settings.head_stories, *few),
    )


def digest_of(own: Stories) -> str:
    """Equal for equal stories in equal order."""
    content = {split: [asdict(story) for story in some] for split, some in own.items()}
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _group(story: Story) -> str:
    return story.group or story.id
