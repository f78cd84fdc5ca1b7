"""Training a few weights and nothing else: can the masked entries be made better than they are?

    minimise over v    (1/N) sum_n L_n(W with W[M] = v)        Adam on the k values v, from v = W[M]

The result is an edit like every other: it is applied, undone, and compared with an edit of equally many
random entries trained in the same way. Everything else stays as it is, norms and embeddings too.

NOT claimed: that k values are few enough not to fit the training samples; measure on stories of another
split.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from tl_tomsparse._additive import additive_hooks
from tl_tomsparse._channels import name, place
from tl_tomsparse._checks import TomsparseError, check_grad_mode, check_positive, check_same_weights
from tl_tomsparse._draws import stream
from tl_tomsparse._model import Reader, view
from tl_tomsparse.edit import SparseEdit
from tl_tomsparse.mask import SparseMask
from tl_tomsparse.samples import Samples, check_samples
from tl_tomsparse.sensitivity import row_losses


@dataclass(frozen=True, eq=False)
class Tuned:
    """A trained edit.

    Attributes:
        edit: the masked entries' new values.
        losses: `[steps]` the mean loss of each step's samples before its update, nats.
    """

    edit: SparseEdit
    losses: list[float] = field(repr=False)


def tune(
    model: Any,
    mask: SparseMask,
    samples: Samples,
    *,
    steps: int = 200,
    batch: int = 16,
    lr: float = 1e-2,
    seed: int = 0,
    show_progress: bool = True,
) -> Tuned:
    """Train the masked entries on samples; no weight of the model is written.

    Args:
        model: unedited, in eval mode; the one that the mask was made from.
        mask: the entries to train.
        samples: of a split that nothing is reported on.
        steps: updates of Adam, whose learning rate falls to 0 as a half cosine.
        batch: samples a step, all of them where there are fewer; each pass is in a new order, and leaves out
            what remains at its end, less than a batch.
        lr: of Adam at the beginning, in multiples of the root mean square of each matrix.
        seed: of the order of samples.
        show_progress: show a progress bar over steps.

    Raises:
        TomsparseError: steps or batch below 1, an lr that is not finite and above 0, a seed that is not a
            whole number from 0, torch.inference_mode, an empty mask, a mask of other weights, an active edit,
            a model in training mode, samples longer than the context, a loss or trained value that is not
            finite.
    """
    seen = view(model)
    seen.require_eval()
    for count, value in (("steps", steps), ("batch", batch)):
        check_positive(count, value)
    if not 0 < lr < float("inf"):
        raise TomsparseError(f"lr={lr!r} must be a finite number above 0, for example 1e-2.")
    draw = np.random.Generator(stream(seed))
    check_grad_mode()
    check_samples(seen, samples)
    if seen.active_edits:
        raise TomsparseError(
            f"{seen.name} has an active edit, {seen.active_edits[-1]}; leave its `with` block first."
        )
    check_same_weights("The mask", mask.identity, "the model", seen.identity())
    if not len(mask):
        raise TomsparseError("The mask is empty, so there is nothing to train; use a larger kappa.")
    exact = torch.float64 if seen.dtype == torch.float64 else torch.float32
    weights = {key: seen.weight(key) for key, index in mask.entries.items() if len(index)}
    # Trained in units of each matrix' root mean square, so that one learning rate fits all.
    size = {key: float(w.detach().double().square().mean().sqrt()) or 1.0 for key, w in weights.items()}
    free = {
        key: torch.zeros(len(mask.entries[key]), dtype=exact, device=seen.device, requires_grad=True)
        for key in weights
    }
    optim = torch.optim.Adam(list(free.values()), lr=lr)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optim, steps)
    order: list[int] = []
    losses: list[float] = []
    for _ in tqdm(range(steps), desc="tune", disable=not show_progress):
        if len(order) < min(batch, len(samples)):
            order = draw.permutation(len(samples)).tolist()
        chosen, order = order[:batch], order[batch:]
        some = samples[chosen]
        read = Reader(seen)
        with torch.enable_grad():  # of a caller who works under no_grad, too
            changes = {key: size[key] * value for key, value in free.items()}
            edits = additive_hooks(seen, mask, changes)
            with seen.hooks([*read.before, *edits, *read.after]):
                loss = row_losses(read, some).mean()
        losses.append(float(loss.detach()))
        if not np.isfinite(losses[-1]):
            raise TomsparseError(
                f"The loss is {losses[-1]} at step {len(losses)}; use a lower lr than {lr:g}, or load the "
                "model in float32."
            )
        gradients = torch.autograd.grad(loss, list(free.values()))
        for vector, gradient in zip(free.values(), gradients):
            vector.grad = gradient
        optim.step()
        fall.step()
    before, after = {}, {}
    for key, weight in weights.items():
        index = mask.entries[key].to(weight.device)
        before[key] = weight[place(mask.shapes[key], index)].cpu()
        trained = before[key].double() + size[key] * free[key].detach().double().cpu()
        after[key] = trained.to(weight.dtype)
        if not bool(after[key].isfinite().all()):
            raise TomsparseError(
                f"Training gives {name(key)} values that are not finite in {weight.dtype}; use a lower lr "
                f"than {lr:g}."
            )
    operator = f"tuned {steps} steps, lr {lr:g}, seed {seed}"
    return Tuned(SparseEdit(mask, MappingProxyType(before), MappingProxyType(after), operator), losses)
