"""A table of text as terminal output, Markdown, LaTeX or HTML. Names may hold any character."""

from __future__ import annotations

import html as markup
import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    text: str
    bold: bool = False


@dataclass(frozen=True)
class Grid:
    name: str
    title: str
    head: list[str]
    rows: list[list[Text]]  # one of a single text is the heading of those below it
    notes: list[str]  # below the table
    comments: list[str]  # for those who read the source


def term(grid: Grid) -> str:
    """As wide as the terminal, else 80 columns. What is bold elsewhere has a ``*``, too."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text as Line

    table = Table(title=Line(_one_line(grid.title)), box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for i, name in enumerate(grid.head):
        table.add_column(Line(_one_line(name)), justify="right" if i else "left", overflow="fold")
    for row in grid.rows:
        if len(row) == 1:
            table.add_section()
            table.add_row(Line(_one_line(row[0].text), "italic"))
            continue
        table.add_row(*(Line(_one_line(c.text) + (" *" if c.bold else ""), "bold" if c.bold else "") for c in row))
    notes = [*grid.notes, *(["* = bold"] if any(cell.bold for row in grid.rows for cell in row) else [])]
    console = Console(highlight=False)
    with console.capture() as capture:
        console.print(Group(table, *(Line(_one_line(note)) for note in notes)))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def md(grid: Grid) -> str:
    def cell(each: Text) -> str:
        return f"**{_md(each.text)}**" if each.bold else _md(each.text)

    def line(row: list[Text]) -> str:
        cells = [f"*{_md(row[0].text)}*", *[""] * (len(grid.head) - 1)] if len(row) == 1 else list(map(cell, row))
        return "| " + " | ".join(cells) + " |"

    lines = [f"**{_md(grid.title)}**", ""]
    lines += ["| " + " | ".join(map(_md, grid.head)) + " |"]
    lines += ["|" + "|".join([":--", *["--:"] * (len(grid.head) - 1)]) + "|"]
    lines += map(line, grid.rows)
    lines += ["", *(_md(note) + "  " for note in grid.notes)]
    return "\n".join(lines).rstrip() + "\n"


def latex(grid: Grid) -> str:
    """A booktabs table; the runs behind each cell stand in comments."""

    def cell(each: Text) -> str:
        return rf"\textbf{{{_latex(each.text)}}}" if each.bold else _latex(each.text)

    def line(row: list[Text]) -> str:
        if len(row) == 1:
            return rf"    \multicolumn{{{len(grid.head)}}}{{l}}{{\textit{{{_latex(row[0].text)}}}}} \\"
        return "    " + " & ".join(map(cell, row)) + r" \\"

    lines = [f"% {_one_line(comment)}" for comment in grid.comments]
    lines += [r"\begin{table}[t]", r"  \centering"]
    lines += [rf"  \caption{{{_latex(grid.title)}. {' '.join(map(_latex, grid.notes))}}}"]
    lines += [rf"  \label{{tab:{re.sub('[^A-Za-z0-9-]', '-', grid.name)}}}"]
    lines += [rf"  \begin{{tabular}}{{l{'r' * (len(grid.head) - 1)}}}", r"    \toprule"]
    lines += ["    " + " & ".join(map(_latex, grid.head)) + r" \\", r"    \midrule"]
    for i, row in enumerate(grid.rows):
        lines += [r"    \midrule"] if len(row) == 1 and i else []
        lines.append(line(row))
    lines += [r"    \bottomrule", r"  \end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def html(grid: Grid) -> str:
    def cell(each: Text, tag: str) -> str:
        text = markup.escape(_one_line(each.text))
        return f"<{tag}>{f'<strong>{text}</strong>' if each.bold else text}</{tag}>"

    title = markup.escape(_one_line(grid.title))
    lines = ["<!doctype html>", '<html lang="en"><head><meta charset="utf-8">', f"<title>{title}</title>", STYLE]
    lines += ["</head><body><table>", f"<caption>{title}</caption>"]
    lines += ["<thead><tr>" + "".join(cell(Text(name), "th") for name in grid.head) + "</tr></thead>", "<tbody>"]
    for r in grid.rows:
        if len(r) == 1:
            wide = f'<th colspan="{len(grid.head)}" class="group">'
            lines.append(f"<tr>{wide}{markup.escape(_one_line(r[0].text))}</th></tr>")
        else:
            lines.append("<tr>" + cell(r[0], "th") + "".join(cell(each, "td") for each in r[1:]) + "</tr>")
    lines += ["</tbody></table>", *(f"<p>{markup.escape(_one_line(note))}</p>" for note in grid.notes)]
    return "\n".join([*lines, "</body></html>"]) + "\n"


RENDERERS: dict[str, Callable[[Grid], str]] = {"term": term, "md": md, "latex": latex, "html": html}

STYLE = (
    "<style>body{font:16px/1.4 system-ui,sans-serif;margin:2em auto;max-width:60em}table{border-collapse:collapse}"
    "caption{text-align:left;font-weight:bold;padding:.5em 0}th,td{padding:.3em .8em;text-align:right;"
    "white-space:nowrap}th:first-child{text-align:left}th{font-weight:normal}thead{border-top:2px solid;"
    "border-bottom:1px solid}th.group{font-style:italic;padding-top:.8em}"
    "tbody{border-bottom:2px solid}p{margin:.3em 0;color:#444}</style>"
)


def _one_line(text: str) -> str:
    """No line ends, no control characters (a name could move the cursor)."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\s]+", " ", text).strip()


def _md(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|~#&$])", r"\\\1", _one_line(text))


LATEX = {c: rf"\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    '"': "''",
    "[": "{[}",  # after a line's end it would be an argument, as would *
    "*": "{*}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "†": r"$^\dagger$",
    "‡": r"$^\ddagger$",
    "Δ": r"$\Delta$",
    "−": "$-$",
}


def _latex(text: str) -> str:
    return "".join(LATEX.get(c, c) for c in _one_line(text))
