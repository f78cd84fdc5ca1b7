"""Layers that several forward passes have in common, computed once; a part of `_model.py`.

    blocks below `start` hand their input on;  the block `start` gets the residual of an earlier pass

For the time of a block the `forward` of each transformer block is replaced on the object, and put back after
an exception and after Ctrl-C too. Nothing is known about architectures: whether a model can begin in the
middle is tried ([`SharedPrefix.refusal`][]), since one whose layers hand on more than the residual cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tl_tomsparse._interrupts import HeldInterrupts

if TYPE_CHECKING:
    from tl_tomsparse._model import ModelView

_MISSING = object()
_RELATIVE = 1e-3  # equal shapes and inputs give equal numbers; what does not belong gives quite others


class SharedPrefix:
    """Begin forward passes in the middle of a model, from what an earlier pass computed; use as a block.

    Args:
        model_view: of the model.

    Attributes:
        skipped: how many blocks were not computed so far.
    """

    def __init__(self, model_view: ModelView) -> None:
        self._blocks = list(model_view.model.blocks)
        self._replaced: dict[int, Any] = {}
        self._kept: dict[int, Tensor] = {}
        self._parts: dict[int, int | None] = {}
        self._wanted: frozenset[int] = frozenset()
        self._start, self._times = 0, 1
        self.skipped = 0
        methods = (SharedPrefix.__enter__.__code__, SharedPrefix.__exit__.__code__)
        self._interrupts = HeldInterrupts(self, *methods)

    def __enter__(self) -> SharedPrefix:
        """Stand before every transformer block."""
        self._interrupts.hold()
        try:
            for layer, block in enumerate(self._blocks):
                self._replaced[layer] = vars(block).get("forward", _MISSING)
                vars(block)["forward"] = self._forward(layer, block.forward)
            self._interrupts.deliver()
        except BaseException:
            self._leave()
            self._interrupts.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put every block's own `forward` back."""
        self._leave()
        self._interrupts.release()

    def keep(self, layers: Collection[int]) -> None:
        """Passes from now on begin at the beginning, and keep what enters these layers."""
        self._kept.clear()
        self._wanted = frozenset(layers)
        self._start = 0

    def start(self, layer: int, times: int) -> None:
        """Passes from now on begin at this layer with what was kept there.

        Args:
            layer: one that was named to `keep`; 0 computes everything.
            times: how often the rows of the earlier pass are repeated, all of them in turn.
        """
        self._wanted = frozenset()
        self._start, self._times = layer, times

    def refusal(self, logits: Callable[[], Tensor], layers: Collection[int]) -> str | None:
        """Why this model cannot begin at these layers; None if it can.

        Args:
            logits: one forward pass, always on the same rows.
            layers: from 1.
        """
        try:
            self.keep(layers)
            expected = logits()
            for layer in layers:
                before = self.skipped
                self.start(layer, 1)
                found = logits()
                if self.skipped - before != layer:
                    return f"its blocks below layer {layer} are not called one by one"
                error = (found - expected).abs().max() / expected.abs().max()
                if not bool(error <= _RELATIVE):  # also where it is nan
                    return f"begun at layer {layer} it gives other logits (relative error {float(error):.1g})"
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            return f"begun in the middle it raises {type(error).__name__}: {error}"
        finally:
            self.keep(())
        return None

    def _forward(self, layer: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            residual = args[0] if args else kwargs["hidden_states"]
            if layer < self._start:
                self.skipped += 1
                parts = self._parts[layer]
                return residual if parts is None else (residual, *[None] * (parts - 1))
            if layer in self._wanted:
                self._kept[layer] = residual
            if layer == self._start and layer:
                residual = self._kept[layer].repeat(self._times, *[1] * (residual.ndim - 1))
                if args:
                    args = (residual, *args[1:])
                else:
                    kwargs = {**kwargs, "hidden_states": residual}
            output = original(*args, **kwargs)
            self._parts[layer] = len(output) if isinstance(output, tuple) else None
            return output

        return forward

    def _leave(self) -> None:
        for layer, former in self._replaced.items():
            if former is _MISSING:
                vars(self._blocks[layer]).pop("forward", None)
            else:
                vars(self._blocks[layer])["forward"] = former
        self._replaced = {}
        self._kept.clear()
