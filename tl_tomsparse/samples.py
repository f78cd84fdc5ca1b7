"""Stories and texts as right-padded tokens with supervised positions.

    L_n = -(1/|S_n|) sum_{p in S_n} log P(token_p | tokens before p)

S_n are the supervised positions of sample n: the answer's tokens of a story's question, or every token of a
window of text. Texts are tokenised here, without special tokens; the BOS token, where the claimed attention
sink sits, is added explicitly and its use recorded. Nothing is claimed about which samples represent a task.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_tomsparse._checks import TomsparseError, check_choice, check_positive
from tl_tomsparse._model import ModelView, view
from tl_tomsparse.stories.story import ALL_CATEGORIES, Story

Supervise = Literal["answer", "last_token"]


@dataclass(frozen=True, eq=False)
class Samples:
    """Right-padded rows of tokens, each with its own loss.

    Attributes:
        tokens: `[n, pos]`, int64.
        attention_mask: `[n, pos]`, True at real tokens, which come first in each row.
        supervised: `[n, pos]`, True at p where token p counts in the loss; it is predicted from position p -
            1, so never at p = 0.
        ids: one name a sample, unique, the same in every run.
        bos: whether rows begin with the BOS token.
        supervise: what is supervised: "answer", "last_token" or "text".
    """

    tokens: Int[Tensor, "n pos"]
    attention_mask: Bool[Tensor, "n pos"]
    supervised: Bool[Tensor, "n pos"]
    ids: tuple[str, ...]
    bos: bool
    supervise: str = "answer"

    def __post_init__(self) -> None:
        """Refuse rows that do not fit together or have no loss."""
        shape = self.tokens.shape
        if not (self.attention_mask.shape == self.supervised.shape == shape and len(self.ids) == shape[0]):
            raise TomsparseError(
                f"Samples do not fit together: tokens {tuple(shape)}, attention_mask "
                f"{tuple(self.attention_mask.shape)}, supervised {tuple(self.supervised.shape)}, "
                f"{len(self.ids)} ids."
            )
        if not self.ids:
            raise TomsparseError("There are no samples.")
        if (self.attention_mask[:, 1:] & ~self.attention_mask[:, :-1]).any():
            raise TomsparseError("Rows must be right-padded, their real tokens first.")
        if self.supervised[:, 0].any() or (self.supervised & ~self.attention_mask).any():
            raise TomsparseError("Padding, and position 0 with nothing before it, cannot be supervised.")
        if bool((without := ~self.supervised.any(1)).any()):
            raise TomsparseError(
                f"Sample {self.ids[int(without.long().argmax())]!r} has no supervised position."
            )

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.ids)

    def __repr__(self) -> str:
        """One line: how many of what."""
        lengths = self.lengths
        return (
            f"Samples({len(self)} x {int(lengths.min())}-{int(lengths.max())} tokens, "
            f"{int(self.supervised.sum())} supervised ({self.supervise}), bos={self.bos})"
        )

    @property
    def lengths(self) -> Int[Tensor, " n"]:
        """Real tokens of each row."""
        return self.attention_mask.sum(1)

    def __getitem__(self, index: slice | Int[Tensor, " m"] | Sequence[int]) -> Samples:
        """Some of the samples, in the order asked for, without padding that none of them needs."""
        rows = torch.arange(len(self))[index]
        mask = self.attention_mask[rows]
        width = int(mask.sum(1).max()) if len(rows) else 0
        return Samples(
            self.tokens[rows, :width],
            mask[:, :width],
            self.supervised[rows, :width],
            tuple(self.ids[row] for row in rows.tolist()),
            self.bos,
            self.supervise,
        )

    def batches(self, batch_tokens: int) -> Iterator[Int[Tensor, " m"]]:
        """Rows of similar length together, at most `batch_tokens` tokens with padding (one row at least).

        Longest first, so that the first batch shows whether memory is enough. Every row comes once.
        """
        check_positive("batch_tokens", batch_tokens)
        order = torch.argsort(self.lengths, descending=True, stable=True)
        start = 0
        while start < len(order):
            rows = max(1, batch_tokens // int(self.lengths[order[start]]))
            yield order[start : start + rows]
            start += rows

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Sequence[int]],
        first_supervised: Sequence[int],
        ids: Sequence[str],
        *,
        bos: bool,
        supervise: str,
        pad: int,
    ) -> Samples:
        """Pads rows on the right; row n is supervised from position `first_supervised[n]` to its end."""
        if not rows:
            raise TomsparseError("There are no samples.")
        length = torch.tensor([len(row) for row in rows])
        position = torch.arange(int(length.max()))[None]
        tokens = torch.full((len(rows), position.shape[1]), pad, dtype=torch.long)
        for n, row in enumerate(rows):
            tokens[n, : len(row)] = torch.as_tensor(row)
        mask = position < length[:, None]
        supervised = mask & (position >= torch.tensor(list(first_supervised))[:, None])
        return cls(tokens, mask, supervised, tuple(ids), bos, supervise)


def story_samples(
    model: Any,
    stories: Sequence[Story],
    *,
    categories: Collection[str] | None = None,
    supervise: Supervise = "answer",
    prepend_bos: bool = True,
    forms: Collection[str] | None = None,
) -> Samples:
    """One sample for each question of the chosen categories: the story, the question, the right answer.

    Args:
        model: whose tokenizer reads the text.
        stories: any number; ids of samples are the story's id and the question's index.
        categories: of questions, any of "false_belief" (alone by default), "true_belief", "reality",
            "memory", "second_order", "false_photograph", "true_photograph", "other".
        supervise: "answer" puts the loss on the answer's tokens. "last_token" leaves the answer away and puts
            it on the prompt's own last token, as the paper's released calibration file does (paper parity).
        prepend_bos: begin each row with the BOS token; False for models without one, and for paper parity.
        forms: of questions, any of "completion", "question"; all by default.

    Returns:
        Samples in the order of stories and questions.

    Raises:
        TomsparseError: no such question, no tokenizer, no BOS token, a text that begins with BOS already, or
            a story longer than the model's context.
    """
    check_choice("supervise", supervise, ("answer", "last_token"))
    stories = check_stories(stories)
    chosen = _names("categories", ("false_belief",) if categories is None else categories, ALL_CATEGORIES)
    forms = _names(
        "forms", ("completion", "question") if forms is None else forms, ("completion", "question")
    )
    model_view = view(model)
    rows: list[list[int]] = []
    starts: list[int] = []
    ids: list[str] = []
    for story in stories:
        for index, question in enumerate(story.questions):
            if question.category not in chosen or question.form not in forms:
                continue
            name = f"{story.id}:{index}"
            prompt, (answer,) = option_tokens(
                model_view, story.prompt(question), (question.answer,), prepend_bos=prepend_bos, name=name
            )
            row = [*prompt, *answer] if supervise == "answer" else prompt
            rows.append(row)
            starts.append(len(prompt) if supervise == "answer" else len(row) - 1)
            ids.append(name)
    if not rows:
        raise TomsparseError(
            f"No question of category {', '.join(chosen)} and form {', '.join(forms)} in "
            f"{len(stories)} stories."
        )
    return Samples.from_rows(
        rows, starts, ids, bos=prepend_bos, supervise=supervise, pad=model_view.pad_token_id
    )


def text_samples(
    model: Any,
    texts: str | Sequence[str],
    *,
    n: int | None = None,
    length: int = 128,
    prepend_bos: bool = True,
    seed: int = 0,
    stride: int | None = None,
) -> Samples:
    """Windows of text in which every token is supervised.

    Texts are tokenised one by one and put end to end; windows do not overlap (unless `stride` says so), and
    what is left at the end is not used.

    Args:
        model: whose tokenizer reads the text.
        texts: one text or several.
        n: how many windows, drawn by `seed`; all of them by default.
        length: tokens in a window, the BOS token included.
        prepend_bos: begin each window with the BOS token.
        seed: of the order of windows; the same on every platform.
        stride: tokens from the start of one window to the next; by default the tokens of text in a window.

    Raises:
        TomsparseError: fewer windows than asked for, a window longer than the model's context, no tokenizer
            or BOS, or a text that begins with BOS already.
    """
    check_positive("length", length - 1)
    model_view = view(model)
    if length > model_view.n_ctx:
        raise TomsparseError(
            f"length={length} is more than {model_view.name}'s context of {model_view.n_ctx} tokens."
        )
    texts = (texts,) if isinstance(texts, str) else texts
    start = _bos(model_view, prepend_bos)
    body = length - len(start)
    step = body if stride is None else stride
    check_positive("stride", step)
    stream: list[int] = []
    for index, text in enumerate(texts):
        tokens = encode(model_view, text)
        _check_single_bos(start, tokens, f"text {index}")
        stream += tokens
    offsets = np.arange(0, len(stream) - body + 1, step)
    wanted = len(offsets) if n is None else n
    check_positive("n", wanted if len(offsets) else 1)
    if len(offsets) < max(wanted, 1):
        raise TomsparseError(
            f"The text has {len(stream)} tokens, enough for {len(offsets)} windows of {length}, and "
            f"{max(wanted, 1)} are needed; give more text, or a smaller n or length."
        )
    # From sorted draws: Generator.permutation may change between versions of numpy.
    order = np.argsort(np.random.Generator(np.random.PCG64(seed)).random(len(offsets)), kind="stable")
    chosen = offsets[order[:wanted]].tolist()
    rows = [[*start, *stream[offset : offset + body]] for offset in chosen]
    ids = [f"tokens {offset}-{offset + body - 1}" for offset in chosen]
    return Samples.from_rows(
        rows, [1] * len(rows), ids, bos=prepend_bos, supervise="text", pad=model_view.pad_token_id
    )


def option_tokens(
    model_view: ModelView, prompt: str, options: Sequence[str], *, prepend_bos: bool, name: str
) -> tuple[list[int], list[list[int]]]:
    """Tokens of a prompt, and of each option as its continuation after a space.

    The option is tokenised together with the prompt. What all of these and the prompt alone have in common at
    the start is the prompt; where a tokenizer joins the last characters of the prompt with the option, these
    belong to the option.

    Args:
        model_view: of the model.
        prompt: everything before the option, without a space at the end.
        options: words; for scoring at least two.
        prepend_bos: begin with the BOS token.
        name: of the item, for messages.

    Returns:
        The prompt's tokens, BOS included, and each option's tokens, at least one each and no two the same.

    Raises:
        TomsparseError: an empty prompt or option, two options with the same tokens, more tokens than the
            context.
    """
    if not prompt.strip():
        raise TomsparseError(f"{name}: the prompt is empty.")
    if not all(option.strip() for option in options):
        raise TomsparseError(f"{name}: an option is empty.")
    start = _bos(model_view, prepend_bos)
    whole = [encode(model_view, f"{prompt} {option}") for option in options]
    common = encode(model_view, prompt)
    _check_single_bos(start, common, name)
    for tokens in whole:
        same = next(
            (i for i, (a, b) in enumerate(zip(common, tokens)) if a != b), min(len(common), len(tokens))
        )
        common = common[:same]
    continuations = [tokens[len(common) :] for tokens in whole]
    if not (start or common):
        raise TomsparseError(f"{name}: nothing comes before the answer; pass prepend_bos=True.")
    for option, tokens in zip(options, continuations):
        if not tokens or continuations.count(tokens) > 1:
            raise TomsparseError(
                f"{name}: option {option!r} has no token that tells it from the others; choose options that "
                "the tokenizer knows."
            )
    longest = len(start) + max(len(tokens) for tokens in whole)
    if longest > model_view.n_ctx:
        raise TomsparseError(
            f"{name} has {longest} tokens and {model_view.name} reads {model_view.n_ctx}; use shorter texts "
            "or a model with a longer context."
        )
    return start + common, continuations


def check_samples(model_view: ModelView, samples: Samples) -> None:
    """Refuse what is no `Samples`, such as a list of strings, rows longer than the model's context, and rows
    that the model would not compute together as it does alone.
    """
    if not isinstance(samples, Samples):
        raise TomsparseError(
            f"samples is a {type(samples).__name__}; make samples with story_samples or text_samples, which "
            "pad on the right and say where the loss is."
        )
    longest = samples.tokens.shape[1]
    if longest > model_view.n_ctx:
        raise TomsparseError(
            f"Samples have up to {longest} tokens and {model_view.name} reads {model_view.n_ctx}; "
            "use shorter ones."
        )
    model_view.require_same_rotation(samples.lengths.tolist())


def check_stories(stories: Iterable[Story]) -> list[Story]:
    """The stories as a list; refuse anything else, such as strings."""
    if isinstance(stories, Story):
        return [stories]
    found = list(stories)
    for story in found:
        if not isinstance(story, Story):
            raise TomsparseError(
                f"stories has a {type(story).__name__}; pass stories of generate_stories or read_jsonl, or "
                "make text into samples with text_samples."
            )
    return found


def _bos(model_view: ModelView, prepend_bos: bool) -> list[int]:
    if model_view.tokenizer is None:
        raise TomsparseError(f"{model_view.name} has no tokenizer; load it with one (load_model does).")
    if not prepend_bos:
        return []
    if model_view.bos_token_id is None:
        raise TomsparseError(
            f"{model_view.name}'s tokenizer has no BOS token; pass prepend_bos=False (--no-bos)."
        )
    return [int(model_view.bos_token_id)]


def _check_single_bos(start: list[int], tokens: list[int], name: str) -> None:
    if start and tokens[:1] == start:
        raise TomsparseError(
            f"{name} begins with the BOS token already; remove it from the text, or pass prepend_bos=False."
        )


def encode(model_view: ModelView, text: str) -> list[int]:
    """The tokens of a text, without special ones."""
    # verbose=False: whole books are tokenised here, and the warning about the context would be wrong.
    return list(model_view.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _names(what: str, chosen: Collection[str], known: Collection[str]) -> tuple[str, ...]:
    names = (chosen,) if isinstance(chosen, str) else tuple(chosen)
    for name in names:
        check_choice(what, name, known)
    return names
