"""What an edit does to the loss, and what the diagonal of the Fisher says that it does.

    L_n(t)       loss of sample n with t times the edit dW in the weights; t = 1 is the edit
    true         L_n(1) - L_n(0)
    first        L_n'(0)                            gradient along the edit
    curvature    L_n''(0) / 2 = dW^T H_n dW / 2     the whole Hessian, by a second backward pass
    diagonal     sum_i F[i] dW[i]^2 / 2             the empirical Fisher in place of the Hessian, off-diagonal
                                                    entries left out: what a ranking by F counts on

Choosing weights by F assumes that `diagonal` says something about `true`. Where it is far from `curvature`,
the off-diagonal entries (or the difference of Fisher and Hessian) matter; where `first + curvature` is far
from `true`, the edit is too large for any second-order account.

NOT claimed: that a loss which rises is a capability that is lost; see `effect` for answers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_tomsparse._additive import additive_hooks
from tl_tomsparse._checks import TomsparseError, check_grad_mode, check_positive, check_same_weights
from tl_tomsparse._intervals import mean_intervals
from tl_tomsparse._model import Reader, view
from tl_tomsparse.edit import SparseEdit
from tl_tomsparse.samples import Samples, check_samples
from tl_tomsparse.sensitivity import Sensitivity, row_losses

if TYPE_CHECKING:
    import pandas as pd

TERMS = ("true", "first", "curvature", "second_order", "diagonal")
_BATCH_TOKENS = {"cpu": 800}
_BATCH_TOKENS_ELSEWHERE = 8192


@dataclass(frozen=True, eq=False)
class LossChange:
    """The change of the loss by an edit, and its predictions, in nats.

    Attributes:
        samples: `[n]` of each term by sample: "true", "first", "curvature", "second_order" (first +
            curvature).
        diagonal: the prediction from the diagonal, one number for all samples; nan without a sensitivity.
        n_weights: number of edited entries.
    """

    samples: dict[str, Float[np.ndarray, " n"]] = field(repr=False)
    diagonal: float
    n_weights: int

    def to_frame(self) -> pd.DataFrame:
        """One row a term: term, mean over samples (nats), low, high (bootstrap 95 %, over samples)."""
        import pandas as pd

        mean, low, high = mean_intervals(np.stack(list(self.samples.values()), axis=1))
        rows = [
            {"term": term, "mean": mean[i], "low": low[i], "high": high[i]}
            for i, term in enumerate(self.samples)
        ]
        rows.append({"term": "diagonal", "mean": self.diagonal, "low": np.nan, "high": np.nan})
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        means = ", ".join(f"{term} {values.mean():+.3g}" for term, values in self.samples.items())
        return (
            f"LossChange({self.n_weights} weights, mean nats: {means}, diagonal {self.diagonal:+.3g}, "
            f"{len(self.samples['true'])} samples)"
        )


def loss_change(
    model: Any,
    edit: SparseEdit,
    samples: Samples,
    *,
    sensitivity: Sensitivity | None = None,
    batch_tokens: int | None = None,
    show_progress: bool = True,
) -> LossChange:
    """The true change of the loss by an edit, and what first and second derivatives make of it.

    Args:
        model: unedited, in eval mode.
        edit: made from it.
        samples: each with its own loss, the mean cross-entropy over its supervised positions.
        sensitivity: of the edit's matrices, for "diagonal".
        batch_tokens: most tokens in one batch, padding included; by default chosen for the device.
        show_progress: show a progress bar over samples.

    Raises:
        TomsparseError: an edit or sensitivity of other weights, a sensitivity without one of the edit's
            matrices, an active edit, a model in training mode, torch.inference_mode, samples longer than the
            context, a loss or derivative that is not finite.
    """
    seen = view(model)
    seen.require_eval()
    check_samples(seen, samples)
    if seen.active_edits:
        raise TomsparseError(
            f"{seen.name} has an active edit, {seen.active_edits[-1]}; leave its `with` block first."
        )
    check_grad_mode()
    check_same_weights("The edit", edit.identity, "the model", seen.identity())
    diagonal = np.nan if sensitivity is None else _diagonal(edit, sensitivity)
    default = _BATCH_TOKENS.get(seen.device.type, _BATCH_TOKENS_ELSEWHERE)
    budget = default if batch_tokens is None else batch_tokens
    check_positive("batch_tokens", budget)
    terms = {term: torch.zeros(len(samples), dtype=torch.float64) for term in ("true", "first", "curvature")}
    changes = {key: change.to(seen.device) for key, change in edit.changes.items()}
    with tqdm(total=len(samples), desc="loss change", disable=not show_progress) as progress:
        for rows in samples.batches(budget):
            batch = samples[rows]
            exact = torch.float64 if seen.dtype == torch.float64 else torch.float32
            t = torch.zeros(len(batch), dtype=exact, device=seen.device, requires_grad=True)
            with torch.enable_grad():  # of a caller who works under no_grad, too
                before = _losses(seen, edit, changes, batch, t)
                slope, bend = _derivatives(before, t)
            with torch.no_grad():
                after = _losses(seen, edit, changes, batch, torch.ones_like(t))
            for term, values in (("true", after - before), ("first", slope), ("curvature", bend / 2)):
                if not bool(values.isfinite().all()):
                    bad = batch.ids[int((~values.isfinite()).long().argmax())]
                    raise TomsparseError(
                        f"The loss change ({term}) of sample {bad!r} is not finite; load the model in "
                        "float32."
                    )
                terms[term][rows] = values.detach().double().cpu()
            progress.update(len(batch))
    found = {term: values.numpy() for term, values in terms.items()}
    found["second_order"] = found["first"] + found["curvature"]
    return LossChange(found, float(diagonal), len(edit))


def _losses(
    seen: Any, edit: SparseEdit, changes: dict[Any, Tensor], batch: Samples, strength: Tensor
) -> Float[Tensor, " batch"]:
    read = Reader(seen)
    edits = additive_hooks(seen, edit.mask, changes, strength)
    with torch.set_grad_enabled(strength.requires_grad), seen.hooks([*read.before, *edits, *read.after]):
        return row_losses(read, batch)


def _derivatives(losses: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """First and second, row by row; 0 where the losses do not hang on `t`, as under an edit of no entries."""
    slope = torch.zeros_like(t)
    if losses.requires_grad:
        (slope,) = torch.autograd.grad(
            losses.sum(), t, create_graph=True, allow_unused=True, materialize_grads=True
        )
    if not slope.requires_grad or slope.grad_fn is None:
        return slope, torch.zeros_like(t)
    return slope, torch.autograd.grad(slope.sum(), t, allow_unused=True, materialize_grads=True)[0]


def _diagonal(edit: SparseEdit, sensitivity: Sensitivity) -> float:
    check_same_weights("The edit", edit.identity, "the sensitivity", sensitivity.identity)
    total = 0.0
    for key, change in edit.changes.items():
        if key not in sensitivity.values:
            raise TomsparseError(
                f"The sensitivity lacks matrix {key[1]} of layer {key[0]}, which the edit changes; compute "
                "it for all of the edit's matrices."
            )
        values = sensitivity[key].flatten().double().cpu()[edit.mask.entries[key]]
        total += float((values * change**2).sum()) / 2
    return total
