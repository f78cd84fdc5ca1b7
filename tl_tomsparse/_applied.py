"""An edit in the weights for the time of a block: written entry by entry, and taken back bit for bit.

Before the first write, all entries are compared with what the edit expects, and saved. From then on, whatever
happens leads to the saved values being written back: an exception while writing, in the block, or in the
middle of writing back, and Ctrl-C at any instruction (see `_interrupts`).

Not claimed: that what the block itself writes to these entries stays; it does not.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tl_tomsparse._channels import name, place
from tl_tomsparse._checks import TomsparseError, check_same_weights
from tl_tomsparse._interrupts import HeldInterrupts
from tl_tomsparse._model import Key, ModelView, as_bits, view

if TYPE_CHECKING:
    from tl_tomsparse.edit import SparseEdit

_ROUNDS = 3  # of writing back: two may be hit by interrupts


class Applied(AbstractContextManager["SparseEdit"]):
    """What `SparseEdit.applied` returns; entered once."""

    def __init__(self, edit: SparseEdit, model: Any) -> None:
        self.edit = edit
        self._seen = view(model)
        self._saved: dict[Key, Entries] | None = None
        self._interrupts = HeldInterrupts(self, Applied.__enter__.__code__, Applied.__exit__.__code__)

    def __enter__(self) -> SparseEdit:
        """Check, save, write."""
        if self._saved is not None:
            raise TomsparseError(
                f"This block of {self.edit} was entered before; call edit.applied(model) again."
            )
        self._interrupts.hold()
        try:
            check_same_weights("The edit", self.edit.identity, "the model", self._seen.identity())
            self._saved = {key: self._checked(key) for key in self.edit.before}
            self._seen.active_edits.append(self)
            for key, entries in self._saved.items():
                self._seen.overwrite(key, entries.place, self.edit.after[key])
            self._interrupts.deliver()
            return self.edit
        except BaseException:
            try:
                self._leave()
            finally:
                self._interrupts.release()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the saved values back."""
        active = self._seen.active_edits
        if self not in active:
            raise TomsparseError(f"{self.edit} is not active; enter its block first, and leave it once.")
        if active[-1] is not self:
            raise TomsparseError(f"{active[-1]} was entered after {self.edit} and is active; leave it first.")
        try:
            self._leave()
        finally:
            self._interrupts.release()

    def __repr__(self) -> str:
        return repr(self.edit)

    def _leave(self) -> None:
        """Write back what was saved, all of it, and only then raise what went wrong on the way."""
        if self not in self._seen.active_edits:
            return  # nothing was written yet
        failure: BaseException | None = None
        left = dict(self._saved or {})
        for _ in range(_ROUNDS):
            for key, entries in tuple(left.items()):
                try:
                    self._seen.overwrite(key, entries.place, entries.values)
                    del left[key]
                except BaseException as error:
                    failure = failure or error
        if not left:  # else the edit stays marked as active, because it is
            self._seen.active_edits.remove(self)
        if failure is not None:
            raise failure

    def _checked(self, key: Key) -> Entries:
        """The present entries of a matrix, if they are as the edit expects, or as active edits made them."""
        index = self.edit.mask.entries[key]
        expected = self.edit.before[key]
        for outer in self._seen.active_edits:
            if key in outer.edit.after:
                theirs = outer.edit.mask.entries[key]
                common = torch.isin(index, theirs, assume_unique=True)
                place = torch.searchsorted(theirs, index[common])
                expected = expected.masked_scatter(common, outer.edit.after[key][place])
        return Entries.read(self._seen, key, index, expected)


@dataclass(frozen=True)
class Entries:
    """Entries of one matrix, with the values that they had when they were read.

    Attributes:
        place: one index tensor for each axis, on the device of the weights.
        values: as read, on that device.
    """

    place: tuple[Tensor, ...]
    values: Tensor

    @classmethod
    def read(cls, seen: ModelView, key: Key, index: Tensor, expected: Tensor) -> Entries:
        """Read the entries at these flat indices.

        Raises:
            TomsparseError: they do not have the expected bits; the message gives the number and the first.
        """
        weight = seen.weight(key)
        entries = place(tuple(weight.shape), index.to(weight.device))
        found = weight[entries]
        if not torch.equal(as_bits(found), as_bits(expected.to(weight.device))):
            differ = (as_bits(found.cpu()) != as_bits(expected)).nonzero().flatten()
            first = int(differ[0])
            raise TomsparseError(
                f"{len(differ)} of {len(index)} entries of {name(key)} of {seen.name} do not have the value "
                f"that the edit expects: at flat index {int(index[first])} is {float(found[first])!r}, not "
                f"{float(expected[first])!r}. Leave active edits first, or make the edit again."
            )
        return cls(entries, found)
