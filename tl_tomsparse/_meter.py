"""Scores of a model under knock-outs: measured in batches, kept, and made into several scores.

    y = mean over questions of the margin (nats), of right answers, or of your own function

What is kept of each set of heads are sums of log-probabilities, so another score of the same prompts costs
nothing. NOT claimed: that knocked-out heads are what the model would be without them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from tqdm.auto import tqdm

from tl_tomsparse._artifacts import read_safetensors, write_safetensors
from tl_tomsparse._checks import TomsparseError, check_choice, check_positive
from tl_tomsparse._knockouts import Ablation, KnockoutRun
from tl_tomsparse._model import view
from tl_tomsparse._prepared import (
    Normalise,
    PreparedScoring,
    PreparedText,
    decide,
    prepare_scoring,
    prepare_text,
)
from tl_tomsparse._scoring import default_batch_tokens
from tl_tomsparse.samples import Samples, check_stories, story_samples
from tl_tomsparse.stories.story import CATEGORIES, Category, Form, Story

if TYPE_CHECKING:
    import pandas as pd

OwnScore = Callable[[Float[np.ndarray, "questions max_options"]], Any]
Score = Literal["margin", "accuracy", "logprob"] | OwnScore

_CHECKPOINT_KIND = "tomsparse.knockouts"
_CHECKPOINT_SECONDS = 10.0
_PROMPTS_IN_A_BATCH = 8  # share of a batch that one lot of prompts fills: the rest is more measurements of it


class KnockoutMeter:
    """Scores of a model under knock-outs, on fixed prompts; each set of heads is measured once.

    Called with a boolean array `[n, heads]` it gives the scores `[n]`, higher is better. Many knock-outs are
    one batch, layers that they have in common are computed once, and prompts of one story share its tokens
    (where the model allows these; `refusal` says why not). Nothing of the model is changed for good.

    Args:
        model: `TransformerBridge` or `HookedTransformer`, in eval mode; edited or not, but always the same.
        stories: whose questions are asked; or `Samples`, whose supervised tokens are scored.
        score: what a measurement is, a mean over questions: "margin" (the answer's log-probability minus the
            best other option's, nats), "accuracy", "logprob" (of the answer; of `Samples`, of a token).
            Or your own function of the options' log-probabilities `[questions, options]`, the answer's
            first and -inf where a question has fewer, which gives one number, or one a question. By default
            "margin", of `Samples` "logprob".
        categories: of questions; all by default. See `scoring` for several scores of one measurement.
        forms: of questions, any of "completion", "question"; all by default.
        ablation: what knocked-out heads give: "zero"; "mean", over the real tokens of `reference`;
            "resample", what they give at the same position (of a shorter prompt, at its end) in another
            prompt of `reference`, the same one in every measurement.
        reference: rows for "mean" and "resample"; by default the prompts asked.
        seed: of the choice of other prompts.
        prepend_bos: begin every prompt with the BOS token.
        normalise: "none" compares summed log-probabilities of options, "tokens" means over their tokens.
        batch_tokens: most tokens in one batch, padding included; by default chosen for the device.
        checkpoint: a file to which measurements are written every few seconds; if it exists, those in it are
            not measured again.
        share_prefix: compute layers below the first knocked-out one once a prompt.
        show_progress: a progress bar over measurements.

    Attributes:
        heads: (layer, head) of each column.
        name: of the score.
        groups: which story (group) each question is of, for intervals.

    Raises:
        TomsparseError: no question; training mode; heads whose outputs cannot be seen; "resample" without
            other prompts; a checkpoint of other weights, prompts or settings.
    """

    def __init__(
        self,
        model: Any,
        stories: Iterable[Story] | Samples,
        *,
        score: Score | None = None,
        categories: Collection[Category] | None = None,
        forms: Collection[Form] | None = None,
        ablation: Ablation = "zero",
        reference: Samples | None = None,
        seed: int = 0,
        prepend_bos: bool = True,
        normalise: Normalise = "none",
        batch_tokens: int | None = None,
        checkpoint: str | Path | None = None,
        share_prefix: bool = True,
        show_progress: bool = True,
    ) -> None:
        check_choice("ablation", ablation, ("zero", "mean", "resample"))
        seen = view(model)
        seen.require_eval()
        self.heads = tuple(seen.heads)
        budget = default_batch_tokens(seen) if batch_tokens is None else batch_tokens
        check_positive("batch_tokens", budget)
        part = max(1, budget // _PROMPTS_IN_A_BATCH)
        self._prepared: PreparedScoring | PreparedText
        if isinstance(stories, Samples):
            self._prepared = prepare_text(model, stories, batch_tokens=part)
            reference = stories if reference is None else reference
        else:
            stories = check_stories(stories)
            self._prepared = prepare_scoring(
                model, stories, prepend_bos=prepend_bos, categories=categories, forms=forms,
                normalise=normalise, batch_tokens=part, pack=ablation != "resample",
            )  # fmt: skip
            if reference is None:
                chosen = CATEGORIES if categories is None else categories
                reference = story_samples(
                    model, stories, categories=chosen, forms=forms, supervise="last_token",
                    prepend_bos=prepend_bos,
                )  # fmt: skip
        run = KnockoutRun(
            seen, self._prepared.reads, self.heads, ablation=ablation, reference=reference, seed=seed,
            budget=budget, share_prefix=share_prefix,
        )  # fmt: skip
        about = [self._prepared.reads.digest, ablation, *_weights(model)]
        if ablation != "zero":
            about += [_digest(reference), str(seed)]
        self._known = _Known(model, run, about, checkpoint, show_progress, self.heads)
        prepared = self._prepared
        n = len(prepared.ids) if isinstance(prepared, PreparedText) else len(prepared.questions)
        self._choose(score, np.arange(n), None, None)

    def _choose(
        self,
        score: Score | None,
        rows: Int[np.ndarray, " items"],
        categories: Collection[str] | None,
        forms: Collection[str] | None,
    ) -> None:
        prepared = self._prepared
        text = isinstance(prepared, PreparedText)
        self._score = ("logprob" if text else "margin") if score is None else score
        if isinstance(self._score, str):
            check_choice("score", self._score, ("logprob",) if text else ("margin", "accuracy", "logprob"))
        elif not callable(self._score):
            raise TomsparseError(f"score={score!r} is neither a name nor a function.")
        name = self._score if isinstance(self._score, str) else getattr(self._score, "__name__", "own score")
        if isinstance(prepared, PreparedText):
            self._rows = self.groups = rows
            self.name = f"{name} of text"
            return
        questions = prepared.questions.iloc[rows]
        keep = np.ones(len(questions), dtype=bool)
        for column, wanted in (("category", categories), ("form", forms)):
            keep &= True if wanted is None else questions[column].isin(list(wanted)).to_numpy()
        questions, self._rows = questions[keep], rows[keep]
        if not len(self._rows):
            raise TomsparseError(
                f"No question of categories {categories} and forms {forms} was asked; make the meter with "
                "them."
            )
        self.groups = np.asarray(questions.group.factorize()[0])
        found = list(dict.fromkeys(questions.category))
        everything = len(self._rows) == len(prepared.questions) and len(found) > 2
        self.name = f"{name} of {'all questions' if everything else ', '.join(found)}"

    def scoring(
        self,
        score: Score | None = None,
        *,
        categories: Collection[Category] | None = None,
        forms: Collection[Form] | None = None,
    ) -> KnockoutMeter:
        """The same measurements under another score, or of some of the questions: nothing is measured twice.

        Args:
            score: as in the constructor; the same as here by default.
            categories: of the questions of this score; all of them by default.
            forms: of the questions of this score; all of them by default.

        Raises:
            TomsparseError: none of the questions is of these; an unknown score.
        """
        other = object.__new__(KnockoutMeter)
        other.heads, other._prepared, other._known = self.heads, self._prepared, self._known
        other._choose(self._score if score is None else score, self._rows, categories, forms)
        return other

    @property
    def refusal(self) -> str | None:
        """After the first measurement: why layers in common are not computed once; None if they are."""
        return self._known.run.refusal

    @property
    def n_measured(self) -> int:
        """How many different sets of heads were measured so far."""
        return len(self._known.totals)

    def __call__(self, out: Bool[np.ndarray, "n heads"], /) -> Float[np.ndarray, " n"]:
        """The score of each measurement."""
        return self.items(out).mean(1)

    def items(self, out: Bool[np.ndarray, "n heads"]) -> Float[np.ndarray, "n items"]:
        """What the mean is taken over: a value for each question (text sample) of each measurement.

        Raises:
            TomsparseError: an array of another shape; a log-probability that is not a finite number; weights
                that are not those that the meter was made for.
        """
        totals = self._known.measured(check_out(out, self.heads))
        return np.stack([self._values(row) for row in totals]) if len(totals) else np.zeros((0, 1))

    def current_items(self, model: Any) -> Float[np.ndarray, " items"]:
        """The items of the model as it is now, also under an edit, with no head out; nothing is kept."""
        return self._values(self._prepared.reads.totals(model, description="now", show_progress=False))

    def questions(self) -> pd.DataFrame | None:
        """What is asked, one row an item (see `StoryScores.frame`); None for text."""
        prepared = self._prepared
        return None if isinstance(prepared, PreparedText) else prepared.questions.iloc[self._rows]

    def _values(self, totals: Float[np.ndarray, " totals"]) -> Float[np.ndarray, " items"]:
        prepared, score = self._prepared, self._score
        if isinstance(prepared, PreparedText):
            values = (totals / prepared.n_tokens)[:, None]
            return values[:, 0] if isinstance(score, str) else _own(score, values)
        scores = prepared.scores(totals)[self._rows]
        if not isinstance(score, str):
            return _own(score, scores)
        if score == "logprob":
            return scores[:, 0]
        margin = decide(scores).margin
        return margin if score == "margin" else (margin > 0).astype(np.float64)


def _own(score: OwnScore, values: Float[np.ndarray, "items options"]) -> Float[np.ndarray, " items"]:
    found = np.atleast_1d(np.asarray(score(values), dtype=np.float64))
    if found.ndim != 1 or not np.isfinite(found).all():
        raise TomsparseError(
            f"Your score gave an array of shape {found.shape} with "
            f"{int((~np.isfinite(found)).sum())} values that are not finite; it must give one number, or one "
            "a question."
        )
    return found


def check_out(out: Any, heads: Sequence[tuple[int, int]]) -> Bool[np.ndarray, "n heads"]:
    """Which heads are out as an array; refuse another shape or type."""
    array = np.asarray(out)
    if array.ndim != 2 or array.shape[1] != len(heads) or array.dtype != bool:
        raise TomsparseError(
            f"out is an array of {array.dtype} of shape {array.shape}; pass booleans [n, {len(heads)}], one "
            "column a head, as knockout_design makes them."
        )
    return array


class _Known:
    """Totals by set of heads, in memory and in a file; shared by all scores of one meter."""

    def __init__(
        self,
        model: Any,
        run: KnockoutRun,
        about: Sequence[str],
        path: str | Path | None,
        show_progress: bool,
        heads: Sequence[tuple[int, int]],
    ) -> None:
        self.run, self.totals = run, dict[bytes, np.ndarray]()
        self._model, self._weights = model, _weights(model)
        self._about = hashlib.blake2b(repr(list(about)).encode(), digest_size=16).hexdigest()
        self._path = None if path is None else Path(path)
        self._show_progress, self._n_heads = show_progress, len(heads)
        self._saved = time.monotonic()
        if self._path is not None and self._path.exists():
            self._load(self._path)

    def measured(self, out: Bool[np.ndarray, "n heads"]) -> list[np.ndarray]:
        if _weights(self._model) != self._weights:
            raise TomsparseError(
                "The model's weights are not those that the meter was made for (an edit, or its end); make "
                "another meter."
            )
        keys = [np.packbits(row).tobytes() for row in out]
        new = {key: index for index, key in enumerate(keys) if key not in self.totals}
        if new:
            wanted = out[list(new.values())]
            with tqdm(total=len(new), desc="knock-outs", disable=not self._show_progress) as bar:

                def store(block: np.ndarray, totals: np.ndarray) -> None:
                    for index, row in zip(block.tolist(), totals):
                        self.totals[np.packbits(wanted[index]).tobytes()] = row
                    bar.update(len(block))
                    self._save(last=False)

                self.run.totals(wanted, store)
            self._save(last=True)
        return [self.totals[key] for key in keys]

    def _save(self, *, last: bool) -> None:
        if self._path is None or not (last or time.monotonic() - self._saved >= _CHECKPOINT_SECONDS):
            return
        sets = np.frombuffer(b"".join(self.totals), dtype=np.uint8).reshape(len(self.totals), -1)
        tensors = {
            "sets": torch.from_numpy(sets.copy()),
            "totals": torch.from_numpy(np.stack(list(self.totals.values()))),
        }
        header = {"kind": _CHECKPOINT_KIND, "about": self._about, "heads": self._n_heads}
        write_safetensors(self._path, tensors, header)
        self._saved = time.monotonic()

    def _load(self, path: Path) -> None:
        tensors, header = read_safetensors(path, _CHECKPOINT_KIND)
        if header.get("about") != self._about:
            raise TomsparseError(
                f"The checkpoint {path} is of other weights, prompts or settings of the knock-outs; delete "
                "it or choose another file."
            )
        for key, row in zip(tensors["sets"].numpy(), tensors["totals"].numpy()):
            self.totals[key.tobytes()] = row


def _weights(model: Any) -> tuple[str, str, str]:
    seen = view(model)
    identity = seen.identity()
    return identity.fingerprint, identity.basis, str(seen.edited())


def _digest(samples: Samples) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (samples.tokens, samples.attention_mask):
        digest.update(repr(tuple(tensor.shape)).encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()
