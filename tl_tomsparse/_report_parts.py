"""Pieces of a run's page; a part of `report`."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tl_tomsparse.verdict import Claim


STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #17202a; background: #fff; margin: 0 auto;
  max-width: 980px; padding: 24px; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3em; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2em 0 .5em; } h3 { font-size: 1rem; margin: 1.6em 0 .3em; }
p { max-width: 46em; } .lead { font-size: 1.1rem; } .quiet { color: #566573; font-size: .9rem; }
table { border-collapse: collapse; font-size: .92rem; margin: .6em 0; }
th, td { padding: .3em .7em; text-align: right; } th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #17202a; vertical-align: bottom; white-space: nowrap; }
tbody tr { border-bottom: 1px solid #e5e8e8; }
small { color: #566573; display: block; white-space: nowrap; font-weight: 400; }
.scroll { overflow-x: auto; } .claims td, .claims th { text-align: left; vertical-align: top; }
.claims td:first-child { min-width: 9em; }
.status { display: inline-block; white-space: nowrap; border-radius: 4px; padding: 0 .5em; font-size: .85rem;
  font-weight: 600; }
.supported { background: #d4efdf; color: #145a32; } .not-supported { background: #fadbd8; color: #78281f; }
.not-testable { background: #e5e8e8; color: #2c3e50; }
.story { border-left: 4px solid #d5d8dc; padding: .2em 1em; margin: 1em 0; }
.story td, .story th { text-align: left; } .story td:first-child { min-width: 14em; }
.wrong { color: #922b21; font-weight: 600; } .right { color: #1d6b3a; }
code { font-size: .85em; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15em 1em; font-size: .92rem; }
dt { color: #566573; } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  body { padding: 14px; } th, td { padding: .3em .45em; } .story { padding: .2em .6em; }
  .claims tr { display: block; padding: .5em 0; }
  .claims td { display: inline-block; padding: .1em .5em .1em 0; }
  .claims td:last-child { display: block; } dl { grid-template-columns: 1fr; } dt { margin-top: .4em; }
}
"""


def html_page(title: str, body: Sequence[str]) -> str:
    """A whole page without any outside resource; the body is HTML."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


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


def status_badge(status: str) -> str:
    """The status of a claim, coloured."""
    return f'<span class="status {status.replace(" ", "-")}">{escape(status)}</span>'


def claims_table(claims: Sequence[Claim]) -> str:
    """One row a claim: its name, its status, its sentence."""
    rows = "".join(
        f"<tr><td>{escape(claim.claim.replace('_', ' '))}</td>"
        f"<td>{status_badge(claim.status)}</td>"
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
