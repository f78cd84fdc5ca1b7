"""Tasks of lm-eval on a model that TransformerLens has, edited or not.

The harness runs the `transformers` model inside the bridge, whose weights are the live ones, so an edit that
is applied holds; hooks of the bridge may not be seen. Prompts, the BOS token and metrics are lm-eval's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tl_tomsparse._checks import TomsparseError, check_positive
from tl_tomsparse._intervals import mean_intervals, proportion_interval
from tl_tomsparse._model import view

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class TaskScores:
    """Results of lm-eval in the columns of a [`Battery`][tl_tomsparse.battery.Battery].

    Attributes:
        frame: one row a task, filter (as subset) and metric (as measure); score is lm-eval's own.
        items: one row a document, for metrics that are means over documents.
    """

    frame: pd.DataFrame = field(repr=False)
    items: pd.DataFrame = field(repr=False)

    def __repr__(self) -> str:
        """One line: how many of what."""
        return f"TaskScores({self.frame.task.nunique()} tasks, {len(self.items)} items)"

    def to_frame(self) -> pd.DataFrame:
        """A copy of the table of scores."""
        return self.frame.copy()


def lm_eval_scores(
    model: Any,
    tasks: Sequence[Any],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    task_manager: Any = None,
) -> TaskScores:
    """Run tasks of lm-eval (extra `evals`) on a bridge.

    Args:
        model: `TransformerBridge`, in eval mode, edited or not.
        tasks: names, configurations or task objects, as `lm_eval.simple_evaluate` takes them. Named tasks
            load data sets that the machine may have to download.
        num_fewshot: examples before each question; by default the task's.
        limit: the first so many documents of each task.
        batch_size: rows in one forward pass.
        seed: of everything that lm-eval draws, and of the bootstrap.
        task_manager: where tasks of yours are found; by default lm-eval's own tasks.

    Returns:
        Scores as lm-eval reports them. Intervals are exact binomial where every document is right or wrong,
        else from a bootstrap over documents, and missing where the metric is no mean over documents.

    Raises:
        TomsparseError: lm-eval is not installed, a `HookedTransformer`, a model in training mode, no task.
    """
    import pandas as pd

    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise TomsparseError(
            "lm-eval is not installed; install it with pip install 'tl-tomsparse[evals]'."
        ) from error
    model_view = view(model)
    model_view.require_eval()
    check_positive("batch_size", batch_size)
    if isinstance(tasks, str) or not tasks:
        raise TomsparseError(f"tasks={tasks!r} must be a list of at least one task of lm-eval.")
    if task_manager is None and not any(isinstance(task, str) for task in tasks):
        task_manager = TaskManager(include_defaults=False)  # reading lm-eval's own takes half a minute
    lm = HFLM(
        model_view.original(),
        tokenizer=model_view.tokenizer,
        batch_size=batch_size,
        device=str(model_view.device),
    )
    found = simple_evaluate(
        lm,
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        bootstrap_iters=0,
        task_manager=task_manager,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    rows: list[dict[str, Any]] = []
    parts: list[pd.DataFrame] = []
    for task, results in found["results"].items():
        samples = found["samples"].get(task, [])
        for name, score in results.items():
            metric, _, which = name.partition(",")
            if not which or metric.endswith("_stderr") or not isinstance(score, int | float):
                continue
            items = _items(f"lm_eval:{task}", which, metric, samples)
            rows.append(_row(f"lm_eval:{task}", which, metric, float(score), len(samples), items, seed))
            parts.append(items)
    items = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    return TaskScores(pd.DataFrame(rows).astype({"above_chance": "boolean"}), items)


def _items(task: str, which: str, metric: str, samples: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The documents of one metric; none if its values are no numbers."""
    import pandas as pd

    rows = []
    for sample in samples:
        if sample.get("filter", which) != which or not isinstance(
            sample.get(metric), int | float | np.number
        ):
            continue
        choices = len(sample["resps"])
        rows.append(
            {
                "task": task,
                "subset": which,
                "measure": metric,
                "item": f"{task}:{sample['doc_id']}",
                "group": f"{task}:{sample['doc_id']}",
                "value": float(sample[metric]),
                "weight": 1.0,
                "margin": np.nan,
                "chance": 1 / choices if choices > 1 and metric.startswith("acc") else np.nan,
            }
        )
    return pd.DataFrame(rows)


def _row(
    task: str, which: str, metric: str, score: float, n: int, items: pd.DataFrame, seed: int
) -> dict[str, Any]:
    import pandas as pd

    row = {"task": task, "subset": which, "measure": metric, "n": n, "groups": n, "score": score}
    chance, above, low, high, interval = np.nan, pd.NA, np.nan, np.nan, ""
    if len(items) and np.isclose(items.value.mean(), score):
        chance = float(items.chance.mean())
        if items.value.isin((0.0, 1.0)).all():
            low, high = proportion_interval(int(items.value.sum()), len(items))
            interval = "exact binomial 95 %"
            above = low > chance if np.isfinite(chance) else pd.NA
        else:
            _, lows, highs = mean_intervals(items[["value"]].to_numpy(), seed=seed)
            low, high, interval = float(lows[0]), float(highs[0]), "bootstrap 95 %"
    return {**row, "low": low, "high": high, "interval": interval, "chance": chance, "above_chance": above}
