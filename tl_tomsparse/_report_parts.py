"""Pieces of a run's page; a part of `report`."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tl_tomsparse.verdict import Claim


class Figures:
    """Figures as HTML; the first one brings plotly.js along."""

    def __init__(self) -> None:
        self._n = 0

    def add(self, figure: go.Figure, *, width: int = 0) -> str:
        """A figure as wide as the page; where that is less than `width` pixels, it scrolls."""
        self._n += 1
        html = figure.to_html(
            full_html=False,
            include_plotlyjs=self._n == 1,
            div_id=f"figure-{self._n}",
            config={"displayModeBar": False, "responsive": True},
        )
        return f'<div class="scroll"><div style="min-width: {width}px">{html}</div></div>'


def claims_table(claims: Sequence[Claim]) -> str:
    """One row a claim: its name, its status, its sentence."""
    rows = "".join(
        f"<tr><td>{escape(claim.claim.replace('_', ' '))}</td>"
        f'<td><span class="status {claim.status.replace(" ", "-")}">{claim.status}</span></td>'
        f"<td>{escape(claim.sentence)}</td></tr>"
        for claim in claims
    )
    return f'<table class="claims"><tbody>{rows}</tbody></table>'


def html_table(head: str, rows: Sequence[str]) -> str:
    """A table that scrolls where the page is too narrow."""
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
