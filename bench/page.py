"""Markdown as the reports write it (headings, paragraphs, tables, lists, blocks of HTML), made into one HTML file that
needs nothing from elsewhere."""

from __future__ import annotations

import re
from html import escape

STYLE = """
:root { color-scheme: light dark; --line: #d0d0d0; --head: #f2f2f2; --base: #222; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --head: #262626; --base: #eee; } }
body { max-width: 1200px; margin: 1.5em auto; padding: 0 1em; font: 15px/1.45 system-ui, sans-serif; }
nav a { margin-right: 1em; white-space: nowrap; }
h2 { margin-top: 2em; border-bottom: 1px solid var(--line); }
.table { overflow-x: auto; margin: 1em 0; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 2px 8px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { background: var(--head); white-space: normal; }
th:first-child { text-align: left; font-weight: normal; background: none; white-space: nowrap; }
thead th:first-child { font-weight: bold; background: var(--head); }
.figures { display: flex; flex-wrap: wrap; gap: 1.5em; }
figure { margin: 0; }
figcaption { font-weight: bold; font-size: 13px; margin-bottom: .5em; }
figcaption span { font-weight: normal; margin-left: 1em; display: inline-block; }
svg { width: 100%; }
svg text { font-size: 10px; fill: currentColor; }
svg line { stroke: var(--line); }
svg line.base { stroke: var(--base); }
"""


def page(markdown: str) -> str:
    """The first block is the title; a contents of all sections follows the blocks before the first section."""
    head, *sections = markdown.strip().removeprefix("# ").split("\n\n## ")
    title, _, text = head.partition("\n\n")
    parts, links = [], []
    for section in sections:
        name, _, body = section.partition("\n\n")
        anchor = re.sub("[^a-z0-9]+", "-", name.lower())
        links.append(f'<a href="#{anchor}">{escape(name)}</a>')
        parts.append(f'<section id="{anchor}">\n<h2>{escape(name)}</h2>\n{_blocks(body)}\n</section>')
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<header>",
            f"<h1>{escape(title)}</h1>\n{_blocks(text)}\n<nav>{' '.join(links)}</nav>\n</header>\n<main>",
            *parts,
            "</main>\n</body>\n</html>\n",
        ]
    )


def _blocks(text: str) -> str:
    return "\n".join(_block(block) for block in text.split("\n\n") if block)


def _block(block: str) -> str:
    lines = block.splitlines()
    if block.startswith("<"):
        return block
    if block.startswith("|"):
        return _table([[cell.strip() for cell in line.strip("|").split("|")] for line in lines])
    if block.startswith("* "):
        return "<ul>" + "".join(f"<li>{_inline(line.removeprefix('* '))}</li>" for line in lines) + "</ul>"
    return f"<p>{_inline(block)}</p>"


def _table(rows: list[list[str]]) -> str:
    header, _, *body = rows
    head = "".join(f'<th scope="col">{_inline(cell)}</th>' for cell in header)
    lines = "\n".join(
        f'<tr><th scope="row">{_inline(first)}</th>' + "".join(f"<td>{_inline(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in body
    )
    return f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'


def _inline(text: str) -> str:
    return re.sub("`(.+?)`", r"<code>\1</code>", escape(text))
