"""How a report looks: one HTML page without any file beside it, and the same as Markdown.

What it says is put together elsewhere (`evals.report`): a title, a summary, figures, and sections
of one table and a note each, all plain text. The page may fetch nothing, and its own content policy
says so to the browser. Figures are SVG images in `data:` addresses: as elements of the page, their
names would clash. In dark mode they are inverted.
"""

import base64
import html
from collections.abc import Sequence
from typing import NamedTuple

from evals.compare import NO_DIFFERENCE, WITHIN_SEEDS

Row = list[str]
Section = tuple[str, str, Row, list[Row]]
"""Heading, note, table header, table rows; left out when there are no rows."""


def count(value: int | None) -> str:
    """1,024; nothing for None."""
    return "" if value is None else f"{value:,}"


class Picture(NamedTuple):
    """A figure of the page.

    Attributes:
        svg: an `<svg>` element, for instance of `plots.to_svg`.
        title: what it shows, for who cannot see it and where it is not loaded.
        caption: below it; may be empty.
        wide: takes the page's whole width, as a heat map may need.
    """

    svg: str
    title: str
    caption: str = ""
    wide: bool = False


COLOURED = {
    "good": ("passed", "it gains", "gains"),
    "bad": ("FAILED", "it degrades", "degrades", "diverges"),
    "even": (NO_DIFFERENCE, "undecided", "n_docs_low"),
}
"""Style of a cell that says one of these words."""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_CSS = """
:root { color-scheme: light dark; --text: #1f2328; --soft: #57606a; --page: #fff; --code: #f6f8fa;
  --line: #e5e7eb; --rule: #d0d7de; --good: #1a7f4b; --bad: #c4321c; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --soft: #9aa4af; --page: #0f1318; --code: #1b222b; --line: #262e38;
    --rule: #3a4552; --good: #4cc38a; --bad: #ff8a70; }
  figure img { filter: invert(.94) hue-rotate(180deg); } }
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--text);
  background: var(--page); max-width: 1120px; margin: 2.5rem auto 4rem; padding: 0 1.5rem;
  overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.12rem; margin: 2.4rem 0 .6rem; }
p.lead { color: var(--soft); margin: 0 0 1.2rem; } p.note { color: var(--soft); font-size: 13px; }
ul.summary { padding-left: 1.1rem; } ul.summary li { margin: .25rem 0; }
div.figures { display: grid; gap: .5rem 1.2rem; margin: 1.2rem 0 .4rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
figure { margin: 0; } figure.wide { grid-column: 1 / -1; }
figure img { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: 13px; }
div.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .75rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--rule); }
.text { text-align: left; }
td.wrap { white-space: normal; min-width: 16rem; }
.good { color: var(--good); } .bad { color: var(--bad); } .even { color: var(--soft); }
code { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, monospace; background: var(--code);
  padding: .1rem .3rem; border-radius: 4px; overflow-wrap: anywhere; white-space: normal; }
@media (max-width: 600px) { body { margin-top: 1.2rem; padding: 0 .9rem; } }
"""


def to_html(
    title: str,
    lead: str,
    summary: Sequence[str],
    pictures: Sequence[Picture],
    sections: Sequence[Section],
    caption: str = "",
) -> str:
    """The whole page. `summary` is one line each, `caption` stands below all pictures."""
    items = "".join(f"<li>{html.escape(line)}</li>" for line in summary)
    body = [
        f"<h1>{html.escape(title)}</h1><p class='lead'>{html.escape(lead)}</p>",
        f"<ul class='summary'>{items}</ul>",
    ]
    if pictures:
        body.append(f"<div class='figures'>{''.join(map(_html_picture, pictures))}</div>")
        body.append(f"<p class='note'>{_html_note(caption)}</p>" if caption else "")
    for heading, note, header, rows in sections:
        if rows:
            body.append(f"<h2>{html.escape(heading)}</h2>{_html_table(header, rows)}")
            body.append(f"<p class='note'>{_html_note(note)}</p>" if note else "")
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_CSS}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def _html_picture(picture: Picture) -> str:
    content = base64.b64encode(picture.svg.encode()).decode()
    caption = f"<figcaption>{html.escape(picture.caption)}</figcaption>" if picture.caption else ""
    return (
        f"<figure{' class=wide' if picture.wide else ''}>"
        f"<img alt='{html.escape(picture.title)}' src='data:image/svg+xml;base64,{content}'>"
        f"{caption}</figure>"
    )


def _html_note(note: str) -> str:
    parts = html.escape(note).split("`")
    return "".join(f"<code>{p}</code>" if k % 2 else p for k, p in enumerate(parts))


def _html_table(header: Row, rows: Sequence[Row]) -> str:
    words = [_is_words([row[k] for row in rows]) for k in range(len(header))]
    head = "".join(
        f"<th{' class=text' if left else ''}>{html.escape(cell)}</th>"
        for cell, left in zip(header, words, strict=True)
    )
    lines = [f"<tr>{''.join(map(_html_cell, row, words))}</tr>" for row in rows]
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f"<div class='scroll' tabindex='0'>{table}</div>"


def _is_words(column: Sequence[str]) -> bool:
    """Whether a column stands on the left: one of numbers does not."""
    return not all(cell[:1] in "+-±0123456789" for cell in column)


def _html_cell(cell: str, left: bool) -> str:
    text = html.escape(cell)
    classes = ["wrap"] if len(cell) > 40 and (" " in cell or len(cell) > 60) else []
    classes += ["text"] if left else []
    classes += [name for name, words in COLOURED.items() if cell in words]
    if " better" in cell:
        shown = cell.count(" better") > cell.count(WITHIN_SEEDS)
        classes.append("good" if shown else "even")
    if len(cell) > 60 and " " not in cell:
        text = f"<code>{text}</code>"
    return f"<td class='{' '.join(classes)}'>{text}</td>" if classes else f"<td>{text}</td>"


def to_markdown(title: str, lead: str, summary: Sequence[str], sections: Sequence[Section]) -> str:
    """The same as Markdown, with the figures as report.png beside it."""
    lines = [f"# {title}", "", lead, "", *(f"- {line}" for line in summary), ""]
    lines += ["![curves](report.png)", ""]
    for heading, note, header, rows in sections:
        if not rows:
            continue
        lines += [f"## {heading}", ""]
        lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
        lines += ["", note, ""] if note else [""]
    return "\n".join(lines)


def to_text(header: Row, rows: Sequence[Row]) -> str:
    """A table for the terminal: columns of one width, the last one ragged."""
    lines = [header, *rows]
    widths = [max(len(line[k]) for line in lines) for k in range(len(header) - 1)]
    return "\n".join(
        "  ".join([*(c.rjust(w) for c, w in zip(line[:-1], widths, strict=True)), line[-1]])
        for line in lines
    )
