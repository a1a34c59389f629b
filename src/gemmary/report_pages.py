"""Sections of a report as one HTML page, and as Markdown. What models said is text in both: it is escaped."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html import escape

__all__ = ["Figure", "Samples", "Section", "Table", "html_page", "markdown_page"]


@dataclass(frozen=True)
class Table:
    """Rows of texts; where a column's are numbers they are set to the right."""

    title: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Figure:
    """A picture as SVG of our own making."""

    title: str
    svg: str


@dataclass(frozen=True)
class Samples:
    """What several models answered to one prompt."""

    source: str
    prompt: str
    answer: str | None
    said: dict[str, str]


@dataclass(frozen=True)
class Section:
    """A part of the report."""

    title: str
    text: str
    tables: list[Table]
    figures: list[Figure] = field(default_factory=list)
    samples: list[Samples] = field(default_factory=list)


_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --faint: #667; --line: #d7dae0; --paper: #fff; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --faint: #9aa1ac; --line: #3a3f47; --paper: #16181c; --card: #1f2228; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.2rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; } h2 { margin: 3rem 0 .4rem; font-size: 1.25rem; border-top: 1px solid var(--line); padding-top: 1.4rem; }
p { max-width: 46rem; } nav { font-size: .95rem; } nav a { margin-right: .7rem; color: inherit; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; } th { text-align: left; font-weight: 600; color: var(--faint); }
th, td { padding: .22rem 1.1rem .22rem 0; border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: break-word; max-width: 44rem; }
td.n, th.n { text-align: right; white-space: nowrap; } tr:last-child td { border-bottom: 0; }
figure { margin: 1.2rem 0; padding: .6rem; background: #fff; border: 1px solid var(--line); border-radius: 6px; color: #222; max-width: 46rem; }
figure svg { width: 100%; height: auto; } figcaption { font-size: .9rem; color: #555; }
.sample { background: var(--card); border-radius: 6px; padding: .7rem 1rem; margin: .8rem 0; } .sample b { color: var(--faint); font-weight: 600; }
.sample .said { display: grid; grid-template-columns: 4.5rem 1fr; gap: .25rem .8rem; margin-top: .5rem; }
.sample pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 5.4rem; overflow: auto; font: .9rem/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
"""
_NUMBER = re.compile(r"[\d,.\s%\[\]+-]*")


def html_page(title: str, sections: list[Section]) -> str:
    """One page: no scripts, nothing loaded from anywhere."""
    links = " ".join(f'<a href="#s{i}">{escape(section.title)}</a>' for i, section in enumerate(sections))
    body = "".join(_section(i, section) for i, section in enumerate(sections))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1><nav>{links}</nav>{body}</body></html>\n"
    )


def _section(number: int, section: Section) -> str:
    text = f"<p>{escape(section.text)}</p>" if section.text else ""
    figures = "".join(
        f"<figure>{figure.svg}<figcaption>{escape(figure.title)}</figcaption></figure>" for figure in section.figures
    )
    samples = "".join(map(_sample, section.samples))
    more = f"<h3>Side by side</h3>{samples}" if samples else ""
    return f'<section><h2 id="s{number}">{escape(section.title)}</h2>{text}{"".join(map(_table, section.tables))}{figures}{more}</section>'


def _table(table: Table) -> str:
    if not table.rows:
        return ""
    numeric = [all(_NUMBER.fullmatch(row[i]) for row in table.rows) for i in range(len(table.columns))]

    def cells(kind: str, row: list[str]) -> str:
        return "".join(
            f"<{kind}{' class=n' if n else ''}>{escape(text)}</{kind}>" for text, n in zip(row, numeric, strict=True)
        )

    head = f"<thead><tr>{cells('th', table.columns)}</tr></thead>" if any(table.columns) else ""
    rows = "".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
    return (
        f'<div class="scroll"><table><caption>{escape(table.title)}</caption>{head}<tbody>{rows}</tbody></table></div>'
    )


def _sample(one: Samples) -> str:
    wanted = f" <b>ends</b> {escape(one.answer)}" if one.answer else ""
    said = "".join(f"<b>{escape(name)}</b><pre>{escape(text)}</pre>" for name, text in one.said.items())
    return f'<div class="sample"><b>{escape(one.source)}</b> {escape(one.prompt)}{wanted}<div class="said">{said}</div></div>'


def markdown_page(title: str, sections: list[Section]) -> str:
    """The same without pictures, as a model card."""
    parts = [f"# {title}\n"]
    for section in sections:
        parts.append(f"## {section.title}\n")
        if section.text:
            parts.append(section.text + "\n")
        for table in section.tables:
            if table.rows:
                lines = [table.columns, ["---"] * len(table.columns), *table.rows]
                parts.append(
                    f"**{table.title}**\n\n"
                    + "\n".join(f"| {' | '.join(map(_plain, line))} |" for line in lines)
                    + "\n"
                )
        for one in section.samples:
            said = "\n".join(f"- {name}: {_code(text)}" for name, text in one.said.items())
            parts.append(f"{one.source}: {_code(one.prompt)}\n\n{said}\n")
    return "\n".join(parts)


def _plain(text: str) -> str:
    """In a cell: on one line, and nothing that Markdown or HTML would obey."""
    return re.sub(r"([\\`*_<>|#\[\]])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """In line, behind more backticks than there are in it."""
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return f"{fence} {' '.join(text.split())} {fence}"
