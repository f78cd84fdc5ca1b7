"""What a study is asked for."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tl_tomsparse._checks import TomsparseError, check_choice, check_kappa, check_positive
from tl_tomsparse._draws import stream
from tl_tomsparse._material import read_text
from tl_tomsparse._model import MATRICES
from tl_tomsparse._study_stories import CHUNKS


@dataclass(frozen=True)
class StudySettings:
    """What a study is asked for.

    Attributes:
        stories: train stories of each sensitivity.
        dev_stories: stories on which kappa is chosen.
        test_stories: held-out stories; a quarter as many photographs and half of that key-value facts join
            them.
        windows: text windows of the general sensitivity, at most as many as the task has samples; a quarter
            as many (at least 10) for perplexity, and an eighth of prose and of patterns beside localisation.
        length: tokens of a window.
        text: files of real text, cut into three parts; none for generated text.
        kappa: sparsity of all masks; None chooses it on dev stories.
        matrices: which weights.
        random_masks: random masks of each kind; a claim needs at least 19.
        few_masks: of these, how many are beside each dose and operator (but five beside amplifying, about
            which there is a claim), and have their change of the loss predicted.
        tune_steps: updates when masked weights are trained.
        head_stories: stories on which heads are found, and as many on which they are measured; 0 leaves heads
            out.
        localisation_items: items at each distance of key-value recall and induction; 0 leaves these and the
            two kinds of text out.
        seed: of everything.
        prepend_bos: begin every sample with the BOS token.
        accuracy_margin, perplexity_margin: what counts as no change.
        n_draws: how often groups of stories are drawn again.
    """

    stories: int = 200
    dev_stories: int = 36
    test_stories: int = 240
    windows: int = 200
    length: int = 128
    text: tuple[str, ...] = ()
    kappa: float | None = None
    matrices: tuple[str, ...] = ("Q", "K")
    random_masks: int = 20
    few_masks: int = 5
    tune_steps: int = 100
    head_stories: int = 6
    localisation_items: int = 20
    seed: int = 0
    prepend_bos: bool = True
    accuracy_margin: float = 0.05
    perplexity_margin: float = 0.05
    n_draws: int = 10_000

    def quick(self) -> StudySettings:
        """A smaller one, for a first look: estimates with their intervals. Of generated stories there are too
        few for claims of damage, which are "not testable" then; random masks are as few as a claim allows.
        """
        return replace(
            self,
            stories=64,
            dev_stories=12,
            test_stories=32,
            windows=40,
            random_masks=19,
            few_masks=3,
            tune_steps=10,
            head_stories=3,
            localisation_items=10,
        )

    def plain(self) -> dict[str, Any]:
        """As JSON gives them back."""
        return dict(json.loads(json.dumps(asdict(self))))

    def check(self) -> None:
        """Refuse what can be refused before any work.

        Raises:
            TomsparseError: a count or margin that is too small or not finite, a negative seed, an unknown
                matrix, a kappa outside (0, 1), a text file that cannot be read.
        """
        for name in ("stories", "dev_stories", "test_stories", "windows", "random_masks", "few_masks"):
            check_positive(name, getattr(self, name))
        for name in ("tune_steps", "n_draws"):
            check_positive(name, getattr(self, name))
        for name in ("head_stories", "localisation_items"):
            if getattr(self, name) < 0:
                raise TomsparseError(f"{name}={getattr(self, name)!r} must be 0 or more.")
        for matrix in self.matrices:
            check_choice("matrices", matrix, MATRICES)
        if not self.matrices:
            raise TomsparseError("No matrices were asked for; name at least one, for example Q,K.")
        if self.stories < 2 * CHUNKS:
            raise TomsparseError(
                f"stories={self.stories} must be at least {2 * CHUNKS}: they are divided into {CHUNKS} parts."
            )
        if self.kappa is not None:
            check_kappa(self.kappa)
            if not self.kappa:
                raise TomsparseError("kappa=0.0 edits no weight; choose one above 0.")
            if self.kappa == 1:
                raise TomsparseError(
                    "kappa=1.0 leaves no weight of whose mean the masked ones could be; choose one below 1."
                )
        if self.length < 2:
            raise TomsparseError(
                f"length={self.length!r} must be at least 2: one token is predicted from another."
            )
        stream(self.seed)
        for name in ("accuracy_margin", "perplexity_margin"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise TomsparseError(f"{name}={getattr(self, name)!r} must be a finite number, 0 or more.")
        for path in self.text:
            read_text(Path(path))
