"""What a run reads: stories and texts of three splits as samples, made (and refused) before long work."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_tomsparse._checks import TomsparseError
from tl_tomsparse._prepared import prepare_scoring, prepare_text
from tl_tomsparse.samples import Samples, story_samples, text_samples
from tl_tomsparse.sensitivity import Sensitivity, fisher_diagonal
from tl_tomsparse.stories import CATEGORIES, Story, generate_stories, generate_texts

if TYPE_CHECKING:
    from tl_tomsparse.pipeline import RunSettings

_FEWEST_WINDOWS = 10  # for a claim about perplexity


@dataclass(frozen=True, eq=False)
class Material:
    """The samples and stories of a run.

    Attributes:
        tom, general: for the sensitivities.
        dev, dev_text: for the sweep.
        test, test_text: held out, for the effect.
        position: held out, for position.
        digest: of all of them.
    """

    tom: Samples
    general: Samples
    dev: list[Story]
    dev_text: Samples
    test: list[Story]
    test_text: Samples
    position: Samples
    digest: str


def stored_sensitivity(
    model: Any, samples: Samples, matrices: Collection[str], path: Path, *, show_progress: bool
) -> Sensitivity:
    """The sensitivity in a file; made if it is not there, from half of one if that is beside it."""
    partial = path.with_suffix(".partial.safetensors")
    if path.exists():
        found = Sensitivity.load(path)
    else:
        found = fisher_diagonal(
            model, samples, matrices=matrices, checkpoint=partial, show_progress=show_progress
        )
        found.save(path)
    partial.unlink(missing_ok=True)  # also that of a run that was killed between the two
    return found


def make_material(model: Any, settings: RunSettings) -> Material:
    """All samples, made (and refused) before the long work begins."""
    texts = general_texts(
        settings.text, max(settings.windows, _FEWEST_WINDOWS), settings.length, settings.seed
    )
    bos, seed = settings.prepend_bos, settings.seed

    def windows(part: str, n: int) -> Samples:
        try:
            return text_samples(model, texts[part], n=n, length=settings.length, prepend_bos=bos, seed=seed)
        except TomsparseError as error:
            raise TomsparseError(
                f"The {part} part of the general text: {error} (--text, --windows, --length)"
            ) from None

    false_belief = generate_stories(settings.stories, seed=seed, split="train", conditions=("false_belief",))
    tom = story_samples(model, false_belief, prepend_bos=bos)
    dev, test = (
        generate_stories(n, seed=seed, split=split)
        for n, split in ((settings.dev_stories, "dev"), (settings.test_stories, "test"))
    )
    held_out = max(_FEWEST_WINDOWS, settings.windows // 4)
    sizes = {"train": settings.windows, "dev": held_out // 2, "test": held_out}
    text = [windows(part, n) for part, n in sizes.items()]
    digest = blake2b(digest_size=16)
    for samples in (tom, *text):
        digest.update(prepare_text(model, samples).reads.digest.encode())
    for stories in (dev, test):
        digest.update(prepare_scoring(model, stories, prepend_bos=bos, pack=True).digest.encode())
    position = story_samples(
        model, _one_question(test, settings.position_stories), categories=CATEGORIES, prepend_bos=bos
    )
    return Material(tom, text[0], dev, text[1], test, text[2], position, digest.hexdigest())


def _one_question(stories: Sequence[Story], n: int) -> list[Story]:
    """Up to `n` stories that have nothing to do with each other, each with one question: a false-belief one
    where it is asked.
    """
    alone = {story.group or story.id: story for story in reversed(stories)}
    chosen = []
    for story in list(alone.values())[::-1][:n]:
        question = next((q for q in story.questions if q.category == "false_belief"), story.questions[0])
        chosen.append(replace(story, questions=(question,)))
    return chosen


def general_texts(files: Sequence[str], n: int, length: int, seed: int) -> dict[str, list[str]]:
    """Text of each split, enough for n windows of `length` tokens: generated, or cut from files."""
    parts = ("train", "dev", "test")
    if not files:
        # About 110 tokens a text; longer windows need more of them.
        each = 1 + n * max(1, length // 64)
        return {part: generate_texts(each, seed=seed, split=part) for part in parts}
    whole = "\n".join(read_text(Path(path)) for path in files)
    cuts = [0, len(whole) * 6 // 10, len(whole) * 8 // 10, len(whole)]
    return {part: [whole[start:end]] for part, start, end in zip(parts, cuts, cuts[1:])}


def read_text(path: Path) -> str:
    """The text of a file; refuses what is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise TomsparseError(
            f"The text file {path} cannot be read: {reason}. Pass a file of UTF-8 text."
        ) from error
    if not text.strip() or "\0" in text:
        raise TomsparseError(
            f"{path} {'holds no text' if not text.strip() else 'is no text file'}; pass a file of UTF-8 text."
        )
    return text
