"""`self_check`: does everything here work on this model? Tried on the model itself, in a second or two.

Sensitivities are compared with autograd on the weights, an edit in the weights with the same edit as hooks, a
padded row with the row alone, and the rotation of queries with the frequencies that were found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from ._checks import TomsparseError
from ._model import NOTHING_TURNED, Key, ModelView, view
from .edit import SparseEdit
from .mask import SparseMask
from .samples import Samples
from .sensitivity import fisher_diagonal

Status = Literal["yes", "no", "not there"]
LENGTHS = (12, 5)  # tokens of the two rows that everything is tried on


@dataclass(frozen=True)
class Check:
    """One thing that was tried.

    Attributes:
        name: of the part.
        status: it works ("yes"), it does not ("no"), or the model has nothing of the kind ("not there").
        detail: what was found, in a sentence.
    """

    name: str
    status: Status
    detail: str


@dataclass(frozen=True)
class SelfCheck:
    """What [`self_check`][] found; prints as a list.

    Attributes:
        model: its name.
        checks: in the order in which they were made.
    """

    model: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing that the model has failed."""
        return all(check.status != "no" for check in self.checks)

    def to_frame(self) -> pd.DataFrame:
        """One row a check: name, status, detail."""
        return pd.DataFrame([vars(check) for check in self.checks])

    def __str__(self) -> str:
        """The list, for people."""
        wide = max(len(check.name) for check in self.checks)
        says = "fully supported" if self.ok else "NOT fully supported"
        lines = [f"{self.model}: {says}"]
        lines += [f"  {check.name:{wide}}  {check.status:9}  {check.detail}" for check in self.checks]
        return "\n".join(lines)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        del cycle
        printer.text(str(self))


def self_check(model: Any, *, cheap: bool = False, seed: int = 0) -> SelfCheck:
    """Try on this model what the package relies on.

    Needs about a dozen forward passes, two of them of up to 256 tokens, one pass of `fisher_diagonal` over
    all matrices, and gradients and copies of the first and last layer's; the model is left as it was, bit for
    bit.

    Args:
        model: `HookedTransformer` or `TransformerBridge`.
        cheap: only that the matrices are found, and that an edit of them changes the logits and is undone: a
            few forward passes of a dozen tokens, which `load_model` makes of every model.
        seed: of the tokens and the mask that are tried.

    Returns:
        [`SelfCheck`][]; nothing is raised for a model that cannot be examined, the report says why.
    """
    try:
        seen = view(model)
        seen.require_eval()
    except TomsparseError as error:
        name = str(getattr(getattr(model, "cfg", None), "model_name", type(model).__name__))
        return SelfCheck(name, (Check("matrices", "no", str(error)),))
    samples = _samples(seen, seed)
    checks = [_matrices(seen), _basis(seen)]
    tried: tuple[tuple[str, Callable[[], tuple[Status, str]]], ...] = (
        ("edit", lambda: _edit(seen, samples, seed)),
        ("sensitivity", lambda: _sensitivity(seen, samples)),
        ("padding", lambda: _padding(seen, samples)),
        ("rotation", lambda: _rotation(seen)),
        ("BOS", lambda: _bos(seen)),
    )
    for name, attempt in tried[:1] if cheap else tried:
        try:
            status, detail = attempt()
        except TomsparseError as error:
            status, detail = "no", str(error)
        except Exception as error:  # whatever an unknown architecture raises belongs into the report
            status, detail = "no", f"{type(error).__name__}: {error}"
        checks.append(Check(name, status, detail))
    return SelfCheck(seen.name, tuple(checks))


def _samples(seen: ModelView, seed: int) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    lengths = [min(length, seen.n_ctx) for length in LENGTHS]
    rows = [torch.randint(seen.d_vocab, (length,), generator=generator).tolist() for length in lengths]
    first = [1] * len(rows)
    return Samples.from_rows(
        rows, first, ["long", "short"], bos=False, supervise="text", pad=seen.pad_token_id
    )


def _matrices(seen: ModelView) -> Check:
    missing = "; ".join(f"{name}: {why}" for name, why in seen.missing.items())
    detail = f"{', '.join(seen.matrices)} in {seen.n_layers} layers" + (
        f" (not {missing})" if missing else ""
    )
    found: Status = "yes" if {"Q", "K"} & set(seen.matrices) else "no"
    return Check("matrices", found, detail)


def _basis(seen: ModelView) -> Check:
    if seen.basis == "raw":
        return Check("weights", "yes", "as the model has them")
    detail = "norms are folded or weights centred: Q and K are other matrices; needs allow_processed=True"
    return Check("weights", "no", detail)


def _tolerance(seen: ModelView) -> float:
    return 1e-3 if seen.weight(_ends(seen)[0]).element_size() >= 4 else 0.1


def _ends(seen: ModelView) -> list[Key]:
    """The matrices of the first and last layer that have any."""
    keys = seen.keys(seen.matrices)
    return [key for key in keys if key[0] in (keys[0][0], keys[-1][0])]


def _sensitivity(seen: ModelView, samples: Samples) -> tuple[Status, str]:
    """Fisher against autograd, row by row, of the first and last layer."""
    found = fisher_diagonal(
        seen.model, samples, matrices=seen.matrices, allow_processed=True, show_progress=False
    )
    bad = [
        f"{matrix} of layer {layer}"
        for (layer, matrix), values in found.items()
        if not values.isfinite().all()
    ]
    if bad:
        return "no", f"gradients of {', '.join(bad)} are not finite"
    still = [f"{matrix} of layer {layer}" for (layer, matrix), values in found.items() if not values.any()]
    if still:
        return "no", f"no gradient reaches {', '.join(still)}"
    worst = 0.0
    for key, value in _by_autograd(seen, samples):
        worst = max(worst, float((found[key].to(value) - value).abs().max() / value.abs().max()))
    status: Status = "yes" if worst < 2 * _tolerance(seen) else "no"
    return status, f"equals autograd on the weights (largest relative difference {worst:.1g})"


def _by_autograd(seen: ModelView, samples: Samples) -> Iterator[tuple[Key, Tensor]]:
    """The mean over rows of the squared gradient of each row's loss, computed without hooks."""
    keys = _ends(seen)
    total: dict[Key, Tensor] = {}
    for n in range(len(samples)):
        length = int(samples.attention_mask[n].sum())
        tokens = samples.tokens[n : n + 1, :length].to(seen.device)

        def loss(tokens: Tensor = tokens) -> Tensor:
            logits = seen.logits(tokens, torch.ones_like(tokens, dtype=torch.bool))[0].float()
            return -logits.log_softmax(-1)[:-1].gather(-1, tokens[0, 1:, None]).mean()

        for key, grad in zip(keys, seen.gradients(keys, loss)):
            total[key] = total.get(key, torch.zeros_like(grad.float())) + grad.float() ** 2 / len(samples)
    yield from total.items()


def _edit(seen: ModelView, samples: Samples, seed: int) -> tuple[Status, str]:
    """Flip the sign of a few entries of the first and last layer, in the weights and as hooks."""
    generator = torch.Generator().manual_seed(seed)
    chosen = {key: torch.rand(seen.shape(key), generator=generator) < 0.05 for key in _ends(seen)}
    mask = SparseMask.from_bool(seen.model, chosen)
    edit = SparseEdit.scale(seen.model, mask, -1.0)
    before = {key: seen.weight(key).clone() for key in mask.entries}
    plain = _logits(seen, samples)
    with edit.applied(seen.model):
        inside = _logits(seen, samples)
    with seen.hooks(edit.hooks(seen.model)):
        hooked = _logits(seen, samples)
    changed = float((inside - plain).norm())
    apart = float((inside - hooked).norm()) / max(changed, 1e-12)
    if not plain.isfinite().all():
        return "no", "its logits are not finite"
    same = all(torch.equal(weight, seen.weight(key)) for key, weight in before.items())
    if not same or not torch.equal(_logits(seen, samples), plain):
        return "no", "the weights are not what they were after an edit"
    if not changed > 0:
        return "no", "an edit does not change the logits"
    if not apart < 2 * _tolerance(seen):
        return (
            "no",
            f"as hooks an edit gives other logits than in the weights (apart by {apart:.2g} of its effect)",
        )
    what = f"the same logits (apart by {apart:.1g} of its effect)"
    return "yes", f"in the weights and as hooks it gives {what}, and is undone exactly"


def _padding(seen: ModelView, samples: Samples) -> tuple[Status, str]:
    """A short row padded beside a long one, and alone."""
    together = _logits(seen, samples)[1]
    length = int(samples.attention_mask[1].sum())
    alone = _logits(seen, samples[[1]])[0]
    error = float((together[:length] - alone[:length]).abs().max() / alone[:length].std())
    if not error < _tolerance(seen):
        return "no", f"a padded row has other logits than the row alone ({error:.2g} standard deviations)"
    return "yes", f"a padded row has the logits of the row alone (apart by {error:.1g})"


def _rotation(seen: ModelView) -> tuple[Status, str]:
    rotations, reasons = seen.rotations
    failed = {layer: why for layer, why in reasons.items() if why not in NOTHING_TURNED}
    if failed:
        return "no", "; ".join(f"layer {layer}: {why}" for layer, why in failed.items())
    if not rotations:
        return "not there", "; ".join(dict.fromkeys(f"no layer: {why}" for why in reasons.values()))
    some = rotations[min(rotations)]
    kinds = "adjacent pairs" if some.adjacent else "half-split pairs"
    left = f"; layers {sorted(reasons)}: {next(iter(reasons.values()))}" if reasons else ""
    shown = "" if some.shown_rotated else "; rotated here, since hook_rot_q never fires"
    what = f"{len(some.frequencies)} {kinds} of {seen.d_head} dimensions"
    return "yes", f"{len(rotations)} layers turn {what} as predicted{shown}{left}"


def _bos(seen: ModelView) -> tuple[Status, str]:
    if seen.tokenizer is None:
        return "not there", "no tokenizer"
    if seen.bos_token_id is None:
        return "not there", "the tokenizer has no token for the beginning of a text"
    token = f"{seen.tokenizer.decode([seen.bos_token_id])!r}, id {seen.bos_token_id}"
    if seen.bos_token_id == getattr(seen.tokenizer, "eos_token_id", None):
        return "yes", f"{token}: the end-of-text token stands in for it"
    return "yes", token


@torch.no_grad()
def _logits(seen: ModelView, samples: Samples) -> Tensor:
    return seen.logits(samples.tokens, samples.attention_mask).float()
