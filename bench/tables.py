"""Figures and tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    body = [header, [":---", *["---:"] * (len(header) - 1)], *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in body)


def three(value: float) -> str:
    """Three significant digits, and no exponent for large values."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
