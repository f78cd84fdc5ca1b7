"""What is refused, and the messages that a user can meet.

Every refusal names the thing, the value that was found, and the cure. All are [`TomsparseError`][], which is
a `ValueError`, so that notebooks that already catch bad values keep working.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tl_tomsparse._model import ModelIdentity


class TomsparseError(ValueError):
    """Something that the user asked for cannot be done as asked; the message says what to do instead."""


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Refuse a value outside a closed list of names."""
    if value not in choices:
        raise TomsparseError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}.")


def check_kappa(kappa: float) -> None:
    """Refuse a sparsity that is not a share of the weights."""
    if not 0.0 <= kappa <= 1.0:
        raise TomsparseError(
            f"kappa={kappa!r} is outside [0, 1]; it is the share of each matrix's weights to choose, "
            "for example 1e-5."
        )


def check_positive(name: str, value: int) -> None:
    """Refuse a count below one."""
    if value < 1:
        raise TomsparseError(f"{name}={value!r} must be at least 1.")


def check_grad_mode() -> None:
    """Refuse inference mode, in which no gradient can be taken; `torch.no_grad` can be left from within."""
    import torch

    if torch.is_inference_mode_enabled():
        raise TomsparseError(
            "torch.inference_mode() is on, and gradients are needed here; leave its `with` block first."
        )


def check_same_weights(thing: str, made_from: ModelIdentity, other: str, found: ModelIdentity) -> None:
    """Refuse to bring together two things that are about different weights, such as a mask and a model."""
    if not made_from.same_weights(found):
        raise TomsparseError(
            f"{thing} is about {_describe(made_from)}, but {other} is about {_describe(found)}. "
            "Make both from one model, loaded with the same weights, dtype and processing."
        )


def _describe(identity: ModelIdentity) -> str:
    return f"{identity.name!r} ({identity.basis} weights, fingerprint {identity.fingerprint[:12]})"
