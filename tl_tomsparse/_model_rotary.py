"""How each layer turns queries and keys by their position; a part of `_model.py`.

    z_m = x_i + 1j x_j,  (i, j) the m-th pair      rotated: s z_m * exp(1j * position * theta_m)

Angular frequencies are taken from wherever the model keeps them, and **checked on the model's own activations
in one forward pass** (`_model_turned`), so no architecture and no scaling rule is known here. Where hook
points show rotated queries and keys, these are compared with what enters the rotation, turned. Where they
never fire, rotated ones are rebuilt, and the attention pattern must be the one that these have.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tl_tomsparse._model_turned import LAST, PatternFit, by_head, error_of_rotated

if TYPE_CHECKING:
    from tl_tomsparse._model import ModelView

LENGTH = 256  # of the row that is looked at: long enough to tell slow frequencies apart
NO_FREQUENCIES = "it has no rotary frequencies"
NOT_ROTATED = "its queries are not rotated"
NOTHING_TURNED = (NO_FREQUENCIES, NOT_ROTATED)  # the model has none; every other reason is a failure
_NO_KEYS = "no hook point shows keys of its own"
_NO_PATTERN = "no hook point shows rotated queries, nor a pattern to check rebuilt ones on"
_OTHER = "what its hook points show after the rotation is not what any of its frequencies predict"
_NOT_REBUILT = (
    "its attention pattern is not what queries and keys predict that are turned by any of its frequencies: "
    "something else is done to them that no hook point shows"
)
Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Rotation:
    """The rotation of one layer.

    Attributes:
        frequencies: `[pairs]`, float64, radians a position, in the model's order.
        first, second: `[pairs]` the two dimensions of a head that each frequency turns, from the first
            towards the second.
        factor: of turned dimensions after the rotation (yarn and LongRoPE have one); `turn` leaves it out.
        sites: hook points that show queries and keys.
        shown_rotated: whether they show them after the rotation (True) or before it.
        norms: what the model does to rotated queries and to rotated keys before it compares them, if
            anything.
    """

    frequencies: Tensor
    first: Tensor
    second: Tensor
    factor: float = 1.0
    sites: tuple[str, str] = ("", "")
    shown_rotated: bool = False
    norms: tuple[Norm, Norm] | None = field(default=None, repr=False)

    @property
    def adjacent(self) -> bool:
        """Whether pairs are (2m, 2m + 1), or (2m + 1, 2m)."""
        return len(self.first) > 1 and int((self.first[0] - self.second[0]).abs()) == 1

    def turn(self, x: Tensor, positions: Tensor, *, back: bool = False) -> Tensor:
        """Rotate `x` `[..., pos, heads, d_head]` by its positions `[..., pos]`, or undo that.

        Computed in float64 and returned in the dtype of x.
        """
        angle = positions.to(torch.float64)[..., None, None] * self.frequencies.to(x.device)
        cos, sin = angle.cos(), angle.sin() * (-1.0 if back else 1.0)
        a, b = (x[..., axes.to(x.device)].to(torch.float64) for axes in (self.first, self.second))
        out = x.clone()
        out[..., self.first.to(x.device)] = (a * cos - b * sin).to(x.dtype)
        out[..., self.second.to(x.device)] = (b * cos + a * sin).to(x.dtype)
        return out

    def compared(self, x: Tensor, part: str, positions: Tensor | None = None) -> Tensor:
        """What attention compares.

        Args:
            x: `[batch, pos, heads, d_head]`, as the site shows it.
            part: "q" or "k".
            positions: `[1, pos]`; by default from 0.
        """
        if not self.shown_rotated:
            positions = torch.arange(x.shape[1])[None] if positions is None else positions
            x = self.turn(x, positions.to(x.device).expand(x.shape[:2]))
            x[..., self.first.to(x.device)] *= self.factor
            x[..., self.second.to(x.device)] *= self.factor
        return x if self.norms is None else self.norms["qk".index(part)](x)


_Found = Rotation | str  # or why there is none
_Tries = Callable[[Rotation], Iterator[tuple[float, Rotation]]]


@torch.no_grad()
def find_rotations(model_view: ModelView, length: int) -> tuple[dict[int, Rotation], dict[int, str]]:
    """The rotation of each layer that has one, and for each other layer with attention why there is none.

    Args:
        model_view: of the model.
        length: of rows; matters to models that choose their frequencies by it.
    """
    model_view.require_eval()  # dropout would change what is compared
    layers = sorted({layer for layer, matrix in model_view.keys(model_view.matrices) if matrix in "QK"})
    parts = [f"{name}_{part}" for name in ("hook", "hook_rot") for part in "qk"]
    parts += [f"{part}_norm.hook_out" for part in "qk"] + [f"hook_{part}_normed" for part in "qk"]
    names = [*parts, "hook_cos", "hook_sin"]
    seen = _shown(model_view, length, [f"blocks.{layer}.attn.{name}" for layer in layers for name in names])
    silent = [layer for layer in layers if f"blocks.{layer}.attn.hook_rot_q" not in seen]
    patterns = _shown(model_view, length, [f"blocks.{layer}.attn.hook_pattern" for layer in silent])
    positions = _row(model_view, length)[1]
    found: dict[int, Rotation] = {}
    reasons: dict[int, str] = {}
    for layer in layers:
        at = f"blocks.{layer}.attn."
        here = {name.removeprefix(at): value for name, value in seen.items() if name.startswith(at)}
        groups = _candidates(model_view, layer, here)
        attention = model_view.model.blocks[layer].attn
        if layer not in silent:
            rotation = _shown_rotated(attention, at, here, positions, groups)
        elif not any(groups):
            rotation = NO_FREQUENCIES
        else:
            pattern = patterns.get(f"{at}hook_pattern")
            rotation = _rebuilt(attention, at, here, positions, pattern, groups)
        if isinstance(rotation, str):
            reasons[layer] = rotation
        else:
            found[layer] = rotation
    return found, reasons


@torch.no_grad()
def same_rotation(model: Any, lengths: Collection[int]) -> bool:
    """Whether rows of these lengths are turned by the same frequencies: some models choose them by the
    largest position of a batch (LongRoPE).
    """
    for owner, name, buffer in list(_buffers(model)):
        kind = name.removesuffix("inv_freq").removesuffix("_")
        options = {"layer_type": kind} if kind else {}
        found = []
        for length in lengths:
            positions = torch.tensor([[0, length - 1]], device=buffer.device)
            try:
                owner(torch.zeros(1, device=buffer.device), positions, **options)
            except (TypeError, ValueError, RuntimeError, AttributeError, KeyError):
                break  # no module of `transformers` that updates its frequencies
            found.append(getattr(owner, name).clone())
        if any(not torch.equal(found[0], other) for other in found[1:]):
            return False
    return True


def _row(model_view: ModelView, length: int) -> tuple[Tensor, Tensor]:
    """Tokens and positions of a row that is turned as rows of this length are: it ends where they do."""
    n = min(length, LENGTH)
    positions = torch.arange(n)
    positions[-1] = length - 1
    return ((torch.arange(n) * 7 + 3) % model_view.d_vocab)[None], positions[None]


def _shown(model_view: ModelView, length: int, names: list[str]) -> dict[str, Tensor]:
    """What the hook points of these names show in one forward pass, in the order in which they fire; of a
    pattern the last queries' rows. Those that do not exist or fire are left out.
    """
    seen: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any, *, name: str) -> None:
        del hook  # the bridge passes another name of the same point
        value = value.detach()
        seen[name] = value[..., -LAST:, :].clone() if name.endswith("pattern") else value

    hooks = [(name, partial(keep, name=name)) for name in names if name in model_view.model.hook_dict]
    if not hooks:
        return seen
    tokens, positions = _row(model_view, length)
    options = {} if tokens.shape[1] == length else {"position_ids": positions.to(model_view.device)}
    with model_view.hooks(hooks):
        model_view.model(
            tokens.to(model_view.device),
            attention_mask=torch.ones_like(tokens).to(model_view.device),
            return_type="logits",
            **options,
        )
    return seen


def _buffers(model: Any) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Buffers of frequencies with their modules and names there."""
    for path, buffer in nn.Module.named_buffers(model):
        owner, _, name = path.rpartition(".")
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq") and buffer.ndim == 1:
            yield nn.Module.get_submodule(model, owner), name, buffer


def _candidates(model_view: ModelView, layer: int, here: dict[str, Tensor]) -> list[list[Rotation]]:
    """Rotations that this layer may have: from buffers, and less exact ones from sines and cosines."""
    attention = model_view.model.blocks[layer].attn
    buffers = [
        (
            buffer.detach().double().cpu(),
            float(getattr(owner, name.replace("inv_freq", "attention_scaling"), 1)),
        )
        for owner, name, buffer in _buffers(model_view.model)
    ]
    tables = []
    if "hook_cos" in here and "hook_sin" in here:
        tables.append((here["hook_cos"].squeeze(0), here["hook_sin"].squeeze(0)))
    if hasattr(attention, "rotary_cos"):
        tables.append((attention.rotary_cos, attention.rotary_sin))
    joined = getattr(getattr(attention, "original_component", None), "embed_positions", None)
    if isinstance(joined, Tensor) and joined.ndim == 2:
        sin, cos = joined.chunk(2, -1)
        tables.append((cos.repeat(1, 2), sin.repeat(1, 2)))
    read = []
    for table in tables:
        cos, sin = (part[1].detach().double().cpu() for part in table)
        theta, factor = torch.atan2(sin, cos), float(torch.hypot(sin, cos).mean())
        read += [(theta[: len(theta) // 2], factor), (theta[::2], factor)]
    return [_paired(made, model_view.d_head) for made in (buffers, read)]


def _paired(made: list[tuple[Tensor, float]], d_head: int) -> list[Rotation]:
    """Each of these frequencies once, in both pairings and both directions."""
    found: dict[tuple[float, ...], list[Rotation]] = {}
    for theta, factor in made:
        if 0 < 2 * len(theta) <= d_head:
            index = torch.arange(len(theta))
            pairs = [(index, index + len(theta)), (2 * index, 2 * index + 1)][: 2 if len(theta) > 1 else 1]
            pairs += [(second, first) for first, second in pairs]
            found[(*theta.tolist(), factor)] = [Rotation(theta, *axes, factor) for axes in pairs]
    return [rotation for several in found.values() for rotation in several]


def _none(d_head: int) -> Rotation:
    """The rotation that leaves everything where it is."""
    return Rotation(torch.zeros(1, dtype=torch.float64), torch.tensor([0]), torch.tensor([d_head - 1]))


def _best(groups: list[list[Rotation]], like: Tensor, tries: _Tries) -> Rotation | None:
    """Of the first group that has any, the rotation whose error is smallest and no more than rounding."""
    for group in groups:
        tried = [pair for rotation in group for pair in tries(rotation)]
        if tried:
            error, best = min(tried, key=lambda pair: pair[0])
            if error < (1e-3 if like.element_size() >= 4 else 5e-2):
                return best
    return None


def _shown_rotated(
    attention: Any, at: str, here: dict[str, Tensor], positions: Tensor, groups: list[list[Rotation]]
) -> _Found:
    """The rotation from what enters it to `hook_rot_q` and `hook_rot_k`."""
    after = [here[f"hook_rot_{part}"] for part in "qk"]
    order = list(here)
    before: list[list[Tensor]] = []
    for pattern in ("hook_{}", "{}_norm.hook_out", "hook_{}_normed"):
        names = [pattern.format(part) for part in "qk"]
        if all(name in here and order.index(name) < order.index("hook_rot_q") for name in names):
            pair = [by_head(here[name], like) for name, like in zip(names, after)]
            before += [[x for x in pair if x is not None]]
    norms = _norms(attention, after)
    before += [[norm(x) for norm, x in zip(both, before[0])] for both in norms] if before else []
    step = max(1, positions.shape[1] // 64)  # as many positions are enough

    def tries(rotation: Rotation) -> Iterator[tuple[float, Rotation]]:
        axes = torch.stack([rotation.first, rotation.second], 1)
        for pair in before:
            if len(pair) == 2:
                errors = [
                    error_of_rotated(x[:, ::step], y[:, ::step], positions[:, ::step], rotation.turn, axes)
                    for x, y in zip(pair, after)
                ]
                yield max(errors), rotation

    best = _best([*groups, [_none(after[0].shape[-1])]], after[0], tries)
    if best is None:
        return _OTHER
    if not best.frequencies.any():
        return NOT_ROTATED
    best = replace(best, sites=(at + "hook_rot_q", at + "hook_rot_k"), shown_rotated=True)
    normed = [here.get(f"hook_{part}_normed") for part in "qk"]
    if normed[0] is None or order.index("hook_q_normed") < order.index("hook_rot_q"):
        return best
    for both in norms:  # a norm after the rotation: attention compares what comes out of it
        if all(y is not None and _same(norm(x), y) for norm, x, y in zip(both, after, normed)):
            return replace(best, norms=both)
    return _OTHER


def _rebuilt(
    attention: Any,
    at: str,
    here: dict[str, Tensor],
    positions: Tensor,
    pattern: Tensor | None,
    groups: list[list[Rotation]],
) -> _Found:
    """The rotation with which queries and keys before it have the attention pattern that is shown."""
    if "hook_k" not in here or "hook_q" not in here:
        return _NO_KEYS
    if pattern is None:
        return _NO_PATTERN
    fit = PatternFit(pattern)
    like = [here[f"hook_{part}"] for part in "qk"]
    norms = [None, *_norms(attention, like)]
    sources: list[tuple[tuple[str, str], Tensor, Tensor]] = []
    for site_q, site_k in (("hook_q", "hook_k"), ("q_norm.hook_out", "k_norm.hook_out")):
        if all(s in here and here[s].shape[:2] == x.shape[:2] for s, x in zip((site_q, site_k), like)):
            q, k = (by_head(here[s], x) for s, x in zip((site_q, site_k), like))
            if q is not None and k is not None:
                sources.append(((at + site_q, at + site_k), q, k))

    def tries(rotation: Rotation) -> Iterator[tuple[float, Rotation]]:
        for sites, q, k in sources:
            for both in norms:
                whole = replace(rotation, sites=sites, norms=both)
                yield (
                    fit.error(whole.compared(q, "q", positions), whole.compared(k, "k", positions)),
                    whole,
                )

    # Without rotation last: where a norm comes after it, what the norm shows explains the pattern, too.
    best = _best([*groups, [_none(like[0].shape[-1])]], pattern, tries)
    if best is None:
        return _NOT_REBUILT
    return best if best.frequencies.any() else NOT_ROTATED


def _norms(attention: Any, like: list[Tensor]) -> Sequence[tuple[Norm, Norm]]:
    """What may be done to queries and keys `[batch, pos, heads, d_head]`: by modules for the two, or by one
    without weights for both.
    """
    parts = [attention._modules.get(name) for name in ("q_norm", "k_norm")]
    pairs = [[getattr(module, "original_component", module) for module in parts]]
    whole = getattr(attention, "original_component", None)
    children = [] if whole is None else list(nn.Module.children(whole))
    pairs += [[child, child] for child in children if not any(True for _ in child.parameters())]
    found = []
    for first, second in pairs:
        q_form, k_form = _form(first, like[0]), _form(second, like[1])
        if q_form is not None and k_form is not None:
            found.append((partial(_apply, first, q_form), partial(_apply, second, k_form)))
    return found


def _form(module: Any, x: Tensor) -> str | None:
    """In which form a module takes such a tensor and gives another one of its shape, if it does."""
    for form in ("heads", "flat", "rows"):
        try:
            out = _apply(module, form, x)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
            continue
        if not torch.equal(out, x):
            return form
    return None


def _apply(module: Any, form: str, x: Tensor) -> Tensor:
    shape = {"heads": x.shape, "flat": (*x.shape[:2], -1), "rows": (-1, x.shape[-1])}[form]
    out: Tensor = module(x.reshape(shape))
    return out.reshape(x.shape)


def _same(norm: Tensor, shown: Tensor) -> bool:
    shown_by_head = by_head(shown, norm)
    tolerance = 1e-3 if norm.element_size() >= 4 else 5e-2
    return shown_by_head is not None and bool(
        (norm - shown_by_head).norm() <= tolerance * shown_by_head.norm()
    )
