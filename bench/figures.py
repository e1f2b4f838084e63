"""Bars and lines as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

# In pixels, as everything here.
CHARACTER = 5.7
ROOM = 290  # for the longest bar, the figure at its end comes on top
BAR, GAP = 11, 6
# Seen on white and on black.
COLOURS = "#8a8a8a #a65fa8 #3fa7a0 #a07850 #c09a1e #e4722b #3f7fc4 #4aa04a #c05f9c #d84f4f #6a6ad0".split()


def _scale(ticks: Sequence[float], log: bool, start: float, end: float) -> Callable[[float], float]:
    """Where a value lies between start, the first tick, and end, the last."""
    low, high, value_of = ticks[0], ticks[-1], math.log if log else float
    span = value_of(high) - value_of(low)
    return lambda value: round(start + (end - start) * (value_of(value) - value_of(low)) / span, 1)


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... or where these are many, powers of ten, from below `low` to above `high`."""
    for factors in ((1, 2, 5), (1,)):
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 2)
        steps = [float(f"{factor}e{exponent}") for exponent in exponents for factor in factors]
        first = max(i for i, step in enumerate(steps) if step <= low)
        last = min(i for i, step in enumerate(steps) if step >= high and i > first)
        if last - first < 8:
            break
    return steps[first : last + 1]


def _figure(title: str, keys: Mapping[str, str], width: float, height: float, parts: Sequence[str]) -> str:
    """`keys`: the CSS border of each name in the legend."""
    legend = "".join(f'<span style="border-bottom:{border}">{escape(name)}</span>' for name, border in keys.items())
    style = f' style="flex:1 1 {0.9 * width:g}px;max-width:{1.1 * width:g}px"'
    svg = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">'
    return f"<figure{style}><figcaption>{escape(title)} {legend}</figcaption>{svg}{''.join(parts)}</svg></figure>"


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def bars(
    title: str,
    groups: Mapping[str, Mapping[str, float]],
    colours: Mapping[str, str],
    ticks: Mapping[float, str],
    show: Callable[[float], str],
    log: bool = False,
) -> str:
    """A group of horizontal bars for each label, in it one for each name: from 1 on a log scale, else from 0."""
    start = CHARACTER * max(map(len, groups)) + 10
    x = _scale(list(ticks), log, start, start + ROOM)
    base = 1.0 if log else 0.0
    parts = []
    y = 0
    for label, values in groups.items():
        parts.append(_text(start - 6, y + BAR * len(values) / 2 + 4, label, "end"))
        for name, value in values.items():
            left, right = sorted((x(base), x(value)))
            hover = escape(f"{label}: {name} {show(value)}")
            parts.append(
                f'<rect x="{left}" y="{y}" width="{right - left:.1f}" height="{BAR - 1}" fill="{colours[name]}">'
                f"<title>{hover}</title></rect>" + _text(right + 3, y + BAR - 2, show(value))
            )
            y += BAR
        y += GAP
    grid = [
        f'<line x1="{x(tick)}" x2="{x(tick)}" y1="0" y2="{y}" class="{"base" if tick == base else "grid"}"/>'
        + _text(x(tick), y + 13, name, "middle")
        for tick, name in ticks.items()
    ]
    names = {name: None for values in groups.values() for name in values}
    keys = {name: f"3px solid {colours[name]}" for name in names}
    return _figure(title, keys, start + ROOM + 40, y + 18, grid + parts)


class Line(NamedTuple):
    colour: str
    dashed: bool
    points: Mapping[float, float]  # y of x


def lines(title: str, curves: Mapping[str, Line], show: Callable[[float], str]) -> str:
    """Both axes logarithmic."""
    width, height, left, bottom = 360, 240, 42, 220
    points = [point for line in curves.values() for point in line.points.items()]
    xs = sorted({x for x, _ in points})
    ys = log_ticks(min(y for _, y in points), max(y for _, y in points))
    place_x, place_y = _scale(xs, True, left, width - 14), _scale(ys, True, bottom, 8)
    parts = [
        f'<line x1="{place_x(x)}" x2="{place_x(x)}" y1="8" y2="{bottom}"/>'
        + _text(place_x(x), bottom + 14, f"{x:g}", "middle")
        for x in xs
    ]
    parts += [
        f'<line x1="{left}" x2="{width - 14}" y1="{place_y(y)}" y2="{place_y(y)}"/>'
        + _text(left - 5, place_y(y) + 4, show(y), "end")
        for y in ys
    ]
    for name, line in curves.items():
        path = " ".join(f"{place_x(x)},{place_y(y)}" for x, y in sorted(line.points.items()))
        dashes = ' stroke-dasharray="5 3"' if line.dashed else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="2"{dashes}/>')
        parts += [
            f'<circle cx="{place_x(x)}" cy="{place_y(y)}" r="3.5" fill="{line.colour}">'
            f"<title>{escape(f'{name}, {x:g}: {show(y)}')}</title></circle>"
            for x, y in line.points.items()
        ]
    keys = {name: f"3px {'dashed' if line.dashed else 'solid'} {line.colour}" for name, line in curves.items()}
    return _figure(title, keys, width, height, parts)


def of_rows(groups: Mapping[str, Mapping[str, dict[str, Any]]], names: Mapping[str, str]) -> list[str]:
    """For each group of rows: how many times longer the peers take than fastrnn, and fastrnn's share of the limit."""
    drawn = []
    for title, rows in groups.items():
        peers = dict.fromkeys([*names, *(peer for row in rows.values() for peer in row["ratios"])])
        ratios = {
            label: {names.get(peer, peer): row["ratios"][peer] for peer in peers if peer in row["ratios"]}
            for label, row in rows.items()
            if row["ratios"]
        }
        if ratios:
            found = [1.0, *(ratio for group in ratios.values() for ratio in group.values())]
            colours = {names.get(peer, peer): COLOURS[i % len(COLOURS)] for i, peer in enumerate(peers)}
            ticks = {tick: f"{tick:g}" for tick in log_ticks(min(found), max(found))}
            drawn.append(bars(f"{title}: time over fastrnn's", ratios, colours, ticks, "{:.2f}".format, log=True))
        shares = {label: {"fastrnn": row["fraction"]} for label, row in rows.items() if "fraction" in row}
        if shares:
            quarters = max(4, math.ceil(4 * max(share["fastrnn"] for share in shares.values())))
            ticks = {quarter / 4: f"{25 * quarter}%" for quarter in range(quarters + 1)}
            drawn.append(bars(f"{title}: share of the limit", shares, {"fastrnn": COLOURS[2]}, ticks, "{:.0%}".format))
    return drawn


def beside(drawn: Sequence[str]) -> str:
    """One block of HTML: figures beside each other as far as there is room."""
    return f'<div class="figures">{"".join(drawn)}</div>'
