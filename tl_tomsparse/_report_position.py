"""The section about position of a run's page; a part of `report`."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from tl_tomsparse import plot
from tl_tomsparse._report_parts import Figures, claims_table
from tl_tomsparse._sink_token import key_name

if TYPE_CHECKING:
    from tl_tomsparse.pipeline import RunResult

_WIDE = 640  # pixels in which figures of three panels can be read


def position_section(result: RunResult, figures: Figures) -> list[str]:
    """The verdict on each claim, and what it is read off."""
    found = result.position
    before, after = found.before, found.after["mask"]
    token = escape(key_name(found.meta["position"], found.meta["bos"]))
    body = [_in_short(result), claims_table(result.position_claims), _how_decided(result)]

    def section(title: str, words: str, *shown: str) -> None:
        body.extend([f"<h3>{title}</h3>", f"<p>{words}</p>", *shown])

    if before.norms is not None and after.norms is not None:
        section(
            "Which frequencies carry the norm",
            "Root mean square of the norm of each pair of dimensions that a rotary frequency turns: queries, "
            "then keys, of which there may be fewer heads.",
            *(
                figures.add(plot.frequency_norms(after.norms, part=part, before=before.norms), width=_WIDE)
                for part in "qk"
            ),
        )
    if len(found.by_frequency):
        section(
            "Where the mask lies among them",
            "Entries of the mask at each frequency, over what random masks with as many entries in each "
            "matrix have there.",
            figures.add(plot.mask_by_frequency(found.by_frequency), width=_WIDE),
        )
    if before.angles is not None:
        section(
            f"Angles between queries and the key of {token}",
            "How many queries have which angle, and the mean of each head. At 90 degrees their product, and "
            "with it the attention logit, is zero.",
            figures.add(plot.angle_histogram(found.degrees), width=_WIDE),
            figures.add(plot.bos_angles(before.angles, after=after.angles), width=_WIDE),
        )
        section(
            "Which frequencies make the angle",
            "The cosine of the angle is a sum over frequencies, and over what is not rotated: what each "
            "adds, a mean over queries. Red brings queries towards the key, blue turns them away.",
            figures.add(plot.bos_cosines(before.angles, after=after.angles), width=_WIDE),
        )
    old, new = (one.attention.rate(found.meta["eps"]) for one in (before, after))
    section(
        f"Attention to {token}",
        f"Mean over the queries that see it. In {100 * old:.1f} % of heads and stories it is above "
        f"{found.meta['eps']:g}, under the mask in {100 * new:.1f} %.",
        figures.add(plot.sinks(before.attention, after=after.attention), width=_WIDE),
    )
    ((layer, head),) = result.patterns[0].patterns
    section(
        f"What layer {layer}, head {head} looks at",
        f"The head that attends most to {token}, on the shortest of these stories.",
        figures.add(
            plot.attention(result.patterns[0], layer=layer, head=head, after=result.patterns[1]), width=_WIDE
        ),
    )
    return body


def _in_short(result: RunResult) -> str:
    claims = result.position_claims
    testable = [claim for claim in claims if claim.status != "not testable"]
    supported = [claim.claim.replace("_", " ") for claim in testable if claim.status == "supported"]
    if not testable:
        return "<p>None of the paper’s claims about position can be tested here.</p>"
    of = f"Of {len(testable)} claims about position that can be tested here"
    if not supported:
        return f"<p>{of}, none is supported.</p>"
    are = "is" if len(supported) == 1 else "are"
    return f"<p>{of}, {len(supported)} {are} supported: {', '.join(supported)}.</p>"


def _how_decided(result: RunResult) -> str:
    meta = result.position.meta
    sinks = ", ".join(f"L{layer}H{head}" for layer, head in result.position.sink_heads) or "none"
    return (
        f'<p class="quiet">On {meta["n_samples"]} held-out stories, one question each, beside '
        f"{meta['n_random']} random edits with as many entries in each matrix. More than random means: on "
        "the claimed side of their mean (bootstrap over stories and random edits, Holm-adjusted over these "
        "claims), and beyond 95 % of them one by one. Heads that attend to the token by more than "
        f"{meta['eps']:g} on average (sink heads): {sinks}.</p>"
    )
