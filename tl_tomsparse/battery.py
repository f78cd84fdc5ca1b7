"""A battery of tasks: belief beside what is no belief, finding things again, and text.

    belief        first-order false and true belief; "paired": all agents of a story right
    second_order  beliefs about beliefs, false and true ones
    reality, memory
    photograph    what pictures show that are out of date or not; "paired": both of a story right
    key_value     recall of a fact, by distance
    induction     going on with a row that begins again, by distance
    perplexity    exp(sum of negative log-probabilities / tokens), by kind of text

and any other stories (`sets`) and tasks of lm-eval. One table of results with intervals and chance, and one
of items with their groups, for differences that are paired by item and drawn again by group.

A task is above chance if the exact 95 % interval of its accuracy is; of beliefs and pictures only "paired"
says that, since each half alone can be had by always naming one place. Where a model is not above chance,
nothing can be damaged.

NOT claimed: that intervals of accuracies cover clustering; they take items as independent.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm.auto import tqdm

from tl_tomsparse._checks import TomsparseError, check_choice, check_positive
from tl_tomsparse._intervals import ClusterBootstrap, proportion_interval
from tl_tomsparse._model import view
from tl_tomsparse._prepared import Normalise, PreparedScoring, PreparedText, prepare_scoring, prepare_text
from tl_tomsparse.evaluate import tabulate
from tl_tomsparse.harness import lm_eval_scores
from tl_tomsparse.localisation import Distances, induction_stories, key_value_stories
from tl_tomsparse.samples import Samples, text_samples
from tl_tomsparse.stories import generate_photographs, generate_stories, generate_texts
from tl_tomsparse.stories.story import ALL_CATEGORIES, Category, Story

if TYPE_CHECKING:
    import pandas as pd

TASKS = (
    "belief",
    "second_order",
    "reality",
    "memory",
    "photograph",
    "key_value",
    "induction",
    "perplexity",
)
_STORY_TASKS: dict[str, tuple[Category, ...]] = {
    "belief": ("false_belief", "true_belief"),
    "second_order": ("second_order",),
    "reality": ("reality",),
    "memory": ("memory",),
}
_TEXTS = {"prose": ("description", "fact"), "patterns": ("counting", "lookup", "repetition")}
_WINDOW = 128  # tokens


@dataclass(frozen=True, eq=False)
class Battery:
    """Results of a battery.

    Attributes:
        frame: one row a task and subset: task, subset, measure ("accuracy", "perplexity" or lm-eval's), n
            (items), groups (drawn together), score, low, high (95 %), interval (how), chance, above_chance
            (missing where there is no chance).
        items: one row an item: task, subset, measure, item, group, value (1 or 0; nats for perplexity),
            weight (1; tokens for perplexity), margin (nats, missing for texts and stories), chance. A score
            is sum(value) / sum(weight), of which perplexity is the exponential.
    """

    frame: pd.DataFrame = field(repr=False)
    items: pd.DataFrame = field(repr=False)

    def __repr__(self) -> str:
        """One line: how many of what."""
        return (
            f"Battery({self.frame.task.nunique()} tasks, {len(self.frame)} scores, {len(self.items)} items)"
        )

    def to_frame(self) -> pd.DataFrame:
        """A copy of the table of scores."""
        return self.frame.copy()


@dataclass(frozen=True, eq=False)
class PreparedBattery:
    """A battery's items as batches of tokens: made once, measured under as many edits as one likes.

    Attributes:
        scorings: for each task (of stories: all of theirs together), the questions.
        labels: task and subset of each question.
        texts: for each kind, the windows.
        seed: of the bootstrap.
    """

    scorings: Mapping[str, PreparedScoring] = field(repr=False)
    labels: Mapping[str, list[tuple[str, str]]] = field(repr=False)
    texts: Mapping[str, PreparedText] = field(repr=False)
    seed: int

    @property
    def digest(self) -> str:
        """Equal for equal items, on any weights and device."""
        parts = [f"{name} {scoring.digest}" for name, scoring in self.scorings.items()]
        parts += [f"{name} {text.reads.digest}" for name, text in self.texts.items()]
        return "\n".join(parts)

    def measure(self, model: Any, *, show_progress: bool = False) -> Battery:
        """The results of a model, edited or not.

        Raises:
            TomsparseError: a log-probability that is not a finite number; a model in training mode.
        """
        import pandas as pd

        parts = []
        with tqdm(
            total=len(self.scorings) + len(self.texts), desc="battery", disable=not show_progress
        ) as bar:
            for name, scoring in self.scorings.items():
                parts.append(_answers(scoring, self.labels[name], model))
                bar.update()
            for kind, text in self.texts.items():
                parts.append(_losses(kind, text, model))
                bar.update()
        items = pd.concat(parts, ignore_index=True)
        orders = {
            "task": tuple(dict.fromkeys((*TASKS, *self.scorings))),
            "subset": (*ALL_CATEGORIES, "paired"),
        }
        items = items.sort_values(
            ["task", "subset"],
            key=lambda column: column.map({name: at for at, name in enumerate(orders[column.name])}).fillna(
                0
            ),
            kind="stable",
            ignore_index=True,
        )
        return Battery(score_table(items, self.seed), items)


def battery(
    model: Any, *, lm_eval: Sequence[Any] = (), show_progress: bool = True, **options: Any
) -> Battery:
    """Measure a model on many tasks at once, inside `with edit.applied(model)` or outside.

    The same arguments give the same items, so that results under different edits are paired by item.

    Args:
        model: `TransformerBridge` or `HookedTransformer`, in eval mode, edited or not.
        lm_eval: tasks of lm-eval to add (extra `evals`), see `lm_eval_scores`; for these a bridge is needed.
        show_progress: show a progress bar over tasks.
        options: all those of [`prepare_battery`][], which says what is asked.

    Raises:
        TomsparseError: as in `prepare_battery` and `lm_eval_scores`, or a log-probability that is not a
            finite number.
    """
    import pandas as pd

    result = prepare_battery(model, **options).measure(model, show_progress=show_progress)
    if not lm_eval:
        return result
    more = lm_eval_scores(model, lm_eval, seed=options.get("seed", 0))
    return Battery(
        pd.concat([result.frame, more.frame], ignore_index=True),
        pd.concat([result.items, more.items], ignore_index=True),
    )


def prepare_battery(
    model: Any,
    *,
    tasks: Collection[str] = TASKS,
    n: int = 100,
    n_localisation: int = 50,
    distances: Distances = "auto",
    texts: Mapping[str, str | Sequence[str]] | None = None,
    n_windows: int = 50,
    sets: Mapping[str, Sequence[Story]] | None = None,
    split: str = "test",
    seed: int = 0,
    prepend_bos: bool = True,
    normalise: Normalise = "none",
    batch_tokens: int | None = None,
    pack: bool = False,
) -> PreparedBattery:
    """Make and tokenise the items of a battery once, to be measured under many edits.

    Args:
        model: in eval mode.
        tasks: which of those of the module docstring.
        n: generated stories, and stories about pictures.
        n_localisation: items at each distance.
        distances: in tokens, see `key_value_stories`.
        texts: kind of text -> one text or several; by default generated ones, "prose" (descriptions and
            facts) and "patterns" (counting, lookups, repetitions).
        n_windows: windows of up to 128 tokens of each kind of text.
        sets: name -> stories of your own, for example of `read_benchmark`; their subsets are categories.
        split: of everything that is generated.
        seed: of everything that is generated, and of the bootstrap.
        prepend_bos: begin every prompt and window with the BOS token.
        normalise: of options, see `score_stories`.
        batch_tokens: most tokens in one batch; by default chosen for the device.
        pack: compute stories once for all of their questions where the model allows it: several times faster,
            but hooks of your own see packed rows.

    Raises:
        TomsparseError: an unknown task, a name of `sets` that is a task, no task at all, a model in training
            mode, and whatever the functions for each task refuse.
    """
    view(model).require_eval()
    sets = sets or {}
    for task in tasks:
        check_choice("tasks", task, TASKS)
    for name in sets:
        if name in (*TASKS, "stories"):
            raise TomsparseError(f"sets has the name {name!r}, which the battery uses; give it another name.")
    check_positive("n_windows", n_windows)
    if not tasks and not sets:
        raise TomsparseError("There is no task to measure; name some in tasks or sets.")
    wanted = [category for task, some in _STORY_TASKS.items() if task in tasks for category in some]
    stories: dict[str, Sequence[Story]] = {}
    if wanted:
        stories["stories"] = generate_stories(n, seed=seed, split=split)
    if "photograph" in tasks:
        stories["photograph"] = generate_photographs(n, seed=seed, split=split)
    for task, make in (("key_value", key_value_stories), ("induction", induction_stories)):
        if task in tasks:
            stories[task] = make(model, n_localisation, distances=distances, seed=seed, split=split)
    scorings: dict[str, PreparedScoring] = {}
    labels: dict[str, list[tuple[str, str]]] = {}
    for name, some in {**stories, **sets}.items():
        scorings[name] = prepare_scoring(
            model,
            some,
            prepend_bos=prepend_bos,
            categories=wanted if name == "stories" else None,
            normalise=normalise,
            batch_tokens=batch_tokens,
            pack=pack,
        )
        labels[name] = _labels(name, scorings[name], some)
    windows: dict[str, PreparedText] = {}
    if "perplexity" in tasks:
        for kind, samples in _windows(model, texts, n_windows, split, seed, prepend_bos).items():
            windows[kind] = prepare_text(model, samples, batch_tokens=batch_tokens)
    return PreparedBattery(scorings, labels, windows, seed)


def _windows(
    model: Any,
    texts: Mapping[str, str | Sequence[str]] | None,
    n: int,
    split: str,
    seed: int,
    prepend_bos: bool,
) -> dict[str, Samples]:
    length = min(_WINDOW, view(model).n_ctx)
    if texts is None:
        # A generated text has about as many tokens as a window.
        texts = {
            kind: generate_texts(4 * n, seed=seed, split=split, kinds=some) for kind, some in _TEXTS.items()
        }
    found = {}
    for kind, some in texts.items():
        try:
            found[kind] = text_samples(model, some, n=n, length=length, prepend_bos=prepend_bos, seed=seed)
        except TomsparseError as error:
            raise TomsparseError(f"texts[{kind!r}]: {error}") from error
    return found


def _labels(name: str, scoring: PreparedScoring, stories: Sequence[Story]) -> list[tuple[str, str]]:
    """Task and subset of each question."""
    asked = {story.id: story.questions for story in stories}
    labels = []
    for row in scoring.questions.itertuples():
        label = (name, str(row.category))
        if name in ("key_value", "induction"):
            label = (name, str(row.condition))
        elif name == "stories":
            task = next(task for task, some in _STORY_TASKS.items() if row.category in some)
            subset = "all" if task in ("reality", "memory") else str(row.category)
            if task == "second_order":
                true = asked[row.story_id][row.question].true_belief
                subset = "true_belief" if true else "false_belief"
            label = (task, subset)
        labels.append(label)
    return labels


def _answers(scoring: PreparedScoring, labels: list[tuple[str, str]], model: Any) -> pd.DataFrame:
    """Items of questions, and of stories whose agents or pictures differ."""
    import pandas as pd

    scores = tabulate(scoring, scoring.outcome(model))
    frame = scores.frame
    parts = [
        pd.DataFrame(
            {
                "task": [task for task, _ in labels],
                "subset": [subset for _, subset in labels],
                "measure": "accuracy",
                "item": frame.story_id + ":" + frame.question.astype(str),
                "group": frame.group,
                "value": frame.correct.astype(float),
                "weight": 1.0,
                "margin": frame.margin,
                "chance": 1 / frame.n_options,
            }
        )
    ]
    task_of = dict(zip(frame.category, (task for task, _ in labels)))
    kinds: tuple[Literal["belief", "photograph"], ...] = ("belief", "photograph")
    for kind in kinds:
        if f"false_{kind}" not in task_of:
            continue
        stories = scores.paired_stories(kind)
        stories = stories[stories.tells_apart]
        parts.append(
            pd.DataFrame(
                {
                    "task": task_of[f"false_{kind}"],
                    "subset": "paired",
                    "measure": "accuracy",
                    "item": stories.story_id,
                    "group": stories.group,
                    "value": stories.correct.astype(float),
                    "weight": 1.0,
                    "margin": np.nan,
                    "chance": stories.chance,
                }
            )
        )
    return pd.concat([part for part in parts if len(part)], ignore_index=True)


def _losses(kind: str, text: PreparedText, model: Any) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(
        {
            "task": "perplexity",
            "subset": kind,
            "measure": "perplexity",
            "item": text.ids,
            "group": text.ids,
            "value": text.nll(model),
            "weight": text.n_tokens.astype(float),
            "margin": np.nan,
            "chance": np.nan,
        }
    )


def score_table(items: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Scores and intervals of every task and subset, in the order of the items."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for (task, subset, measure), some in items.groupby(["task", "subset", "measure"], sort=False):
        n, chance = len(some), float(some.chance.mean())
        score = float(some.value.sum() / some.weight.sum())
        if measure == "perplexity":
            values, weights = some.value.to_numpy(), some.weight.to_numpy()
            estimate = ClusterBootstrap(n, seed=seed, smooth=False).ratio(values, weights)
            score, low, high = (float(np.exp(x)) for x in (score, estimate.low, estimate.high))
            interval, above = "bootstrap 95 % by window", pd.NA
        else:
            low, high = proportion_interval(int(some.value.sum()), n)
            interval, above = "exact binomial 95 %", low > chance
        row = {"task": task, "subset": subset, "measure": measure, "n": n, "groups": some.group.nunique()}
        row |= {"score": score, "low": low, "high": high, "interval": interval}
        rows.append({**row, "chance": chance, "above_chance": above})
    return pd.DataFrame(rows).astype({"above_chance": "boolean"})
