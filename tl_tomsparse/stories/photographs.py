"""False photographs: false representations without a mind, the usual control of false belief.

A thing is put somewhere, pictures are taken, the thing is moved, and pictures are taken again. Nobody leaves,
so no person is wrong; a picture from before shows what is no longer so. What a picture shows is computed by
the same logic as beliefs: it is an observer that learns where the thing is when it is made, and sees nothing
afterwards. Conditions (of one of the two pictures; the other has a fate of its own):
`false_photograph` (made before the thing is moved), `taken_after`, `no_transfer`.

Two different pictures of one story can be told apart only by when each was made; `StoryScores.paired` with
kind="photograph" counts the stories in which both are right.

NOT claimed: that a model without pictures in its training understands the word; the questions about reality
and memory say whether it follows these stories at all.
"""

from __future__ import annotations

from collections.abc import Sequence

from .._checks import TomsparseError, check_choice, check_positive
from .generate import FORMS, as_story
from .lexicon import PLACES, ROOMS, THINGS, Draw, check_split, split_of
from .logic import State, change, learn, update
from .scenarios import Scene, draw_people
from .story import Form, Question, Story
from .wording import WORDINGS, Wording, listed, told

PHOTOGRAPHS = ("false_photograph", "taken_after", "no_transfer")
_MADE = {
    "photo": ("{P} takes a photo of the {R}.", "{P} has a camera and takes a photo of the {R}."),
    "map": ("{P} draws a map of the {R}.", "{P} takes a pen and draws a map of the {R}."),
    "picture": ("{P} paints a picture of the {R}.", "{P} sits down and paints a picture of the {R}."),
    "drawing": ("{P} makes a drawing of the {R}.", "{P} takes a pencil and makes a drawing of the {R}."),
}
_ASKED: dict[Form, tuple[str, ...]] = {
    "completion": ("In the {K}, the {O} is in the", "The {K} shows the {O} in the"),
    "question": (
        "Question: Where is the {O} in the {K}? Answer: in the",
        "Where does the {K} show the {O}? In the",
    ),
}


def generate_photographs(
    n: int,
    *,
    seed: int = 0,
    split: str = "train",
    conditions: Sequence[str] | None = None,
    wording: Wording = "seen",
    forms: Sequence[Form] = FORMS,
    distractors: bool = True,
) -> list[Story]:
    """Generate stories about pictures that show what is so, or what was so before.

    Each story asks what either picture shows, and about reality and memory. Twins (2k and 2k + 1) differ only
    in that the places change roles. The same arguments give the same stories on every platform.

    Args:
        n: how many stories.
        seed: of all draws.
        split: "train", "dev" or "test"; divided as in `generate_stories`.
        conditions: restrict to some of "false_photograph", "taken_after", "no_transfer", each equally often;
            by default false photographs are half of the stories.
        wording: of everything but the pictures, see `generate_stories`.
        forms: "completion", "question" or both (drawn for each question).
        distractors: add sentences without a bearing on the answers.

    Returns:
        The stories, in a fixed order; scenario "photograph".

    Raises:
        TomsparseError: for a value outside the ranges above.
    """
    check_positive("n", n)
    check_split(split)
    check_choice("wording", wording, WORDINGS)
    for form in forms:
        check_choice("forms", form, FORMS)
    first, *others = PHOTOGRAPHS
    slots = [slot for other in others for slot in (first, other)] if conditions is None else list(conditions)
    for condition in slots:
        check_choice("conditions", condition, PHOTOGRAPHS)
    if not slots or not forms:
        raise TomsparseError(f"conditions={conditions!r}, forms={forms!r} leave no story; name one of each.")
    prefix = f"photograph-{split}-{seed}-{'' if wording == 'seen' else 'new-'}"
    stories = []
    for i in range(n):
        twin = i // 2
        draw = Draw("tl_tomsparse photograph", seed, split, wording, twin)
        scene, pictures = _scene(draw, slots[twin % len(slots)], split, wording, i % 2 == 1, distractors)
        questions = (
            scene.question("reality", form=draw.choice(forms)),
            scene.question("memory", form=draw.choice(forms)),
            *(_question(scene, picture, draw.choice(forms)) for picture in draw.shuffled(pictures)),
        )
        stories.append(as_story(scene, questions, prefix, i, split))
    return stories


def _scene(
    draw: Draw, condition: str, split: str, wording: Wording, swap: bool, distractors: bool
) -> tuple[Scene, list[str]]:
    one, two, _ = draw_people(draw, split, 2)
    pictures = draw.sample(tuple(_MADE), 2)
    told_of = {*_MADE, "camera", "pen", "pencil"}
    while True:
        thing, places = draw.choice([t for t in THINGS if t not in told_of]), draw.sample(PLACES, 2)
        if split_of(thing, *places) == split and thing not in places:
            break
    if swap:
        places.reverse()
    before, after = places
    people = draw.shuffled([one, two])
    room = draw.choice([r for r in ROOMS if r not in places])
    slots = {"O": thing, "R": room}
    scene = Scene(draw, wording, "photograph", condition, people, pictures[0], places, before, slots)
    scene.inside |= set(people)
    observers = [*people, *pictures]
    mentioned = dict(zip("AB", draw.shuffled(range(2))))
    scene.tell("intro", None, L=listed(people))
    scene.tell("places", None, **{slot: places[i] for slot, i in mentioned.items()})
    state = State.common_belief(observers, {"place": before})
    scene.tell("put", state, M=draw.choice(people), A=before)
    early = {"false_photograph": True, "taken_after": False}.get(condition)
    is_early = {pictures[0]: draw.coin() if early is None else early, pictures[1]: draw.coin()}

    def make(when: bool) -> None:
        for picture in draw.shuffled([p for p in pictures if is_early[p] is when]):
            event = learn(observers, "place", places, {picture}, people)
            text = told(draw, _MADE[picture], P=draw.choice(people), **slots)
            scene.add(text, update(scene.state, event))

    make(True)
    mover = draw.choice(people)
    if condition == "no_transfer":
        scene.tell("no_move", scene.state, M=mover, B=after)
    else:
        state = update(scene.state, change(observers, "place", after, people))
        scene.tell("move", state, M=mover, A=before, B=after)
    make(False)
    if distractors:
        scene.pad("about_place", "A")
    return scene, pictures


def _question(scene: Scene, picture: str, form: Form) -> Question:
    shown, real = scene.state.belief((picture,), "place"), scene.state.belief((), "place")
    assert shown is not None
    text = told(scene.draw, _ASKED[form], K=picture, **scene.slots)
    options = tuple(scene.draw.shuffled(scene.values))
    return Question("photograph", (picture,), text, form, shown, options, shown == real)
