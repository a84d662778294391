"""Write the report: one page that opens without a network, its pictures, a Markdown summary, and all figures."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from sasa_export.research.locate.expression import is_readable
from sasa_export.research.locate.plots import DARK, LIGHT
from sasa_export.research.locate.result import Located
from sasa_export.research.locate.words import Section, pictures, sections, subject_line, summary, title

STYLE = """\
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2328; --faint: #57606a; --line: #d0d7de;
  --mark: #ddf4ea; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171c; --ink: #e6e8eb; --faint: #9aa4af; --line: #30363d; --mark: #123a2d; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.25rem 1rem 4rem; max-width: 46rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 0.5rem; }
.result { font-size: 1.15rem; font-weight: 600; border-left: 0.3rem solid #009e73; padding: 0.5rem 0 0.5rem 0.9rem;
  margin: 1rem 0; }
ul { padding-left: 1.2rem; }
li { margin: 0.35rem 0; }
code { font-size: 0.85em; }
.faint { color: var(--faint); font-size: 0.92rem; }
img { display: block; width: 100%; height: auto; margin: 0.75rem 0; border-radius: 4px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.7rem 0.2rem 0; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--faint); font-weight: 600; }
td.readable { background: var(--mark); }
"""


def write_report(located: Located, directory: Path) -> None:
    """Write report.html, report.md, locate.json and the pictures."""
    light, dark = pictures(located, LIGHT), pictures(located, DARK)
    for name, data in light.items():
        (directory / f"{name}.png").write_bytes(data)
    (directory / "report.html").write_text(page(located, light, dark), encoding="utf-8")
    (directory / "report.md").write_text(markdown(located), encoding="utf-8")
    (directory / "locate.json").write_text(located.to_json(), encoding="utf-8")


def page(located: Located, light: dict[str, bytes], dark: dict[str, bytes]) -> str:
    """The page, pictures and style within; it loads nothing."""
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title(located))}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>",
        f'<h1>{escape(title(located))}</h1>\n<p class="result">{escape(summary(located))}</p>',
        f'<p class="faint">{escape(subject_line(located))}</p>',
    ]
    if located.subject.command:
        parts.append(f'<p class="faint">Made with <code>{escape(located.subject.command)}</code>.</p>')
    for section in sections(located):
        parts.append(f"<h2>{escape(section.heading)}</h2>")
        if section.listed:
            points = [paragraph.partition(":") for paragraph in section.paragraphs]
            lines = [f"<li><strong>{escape(name + colon)}</strong>{escape(rest)}</li>" for name, colon, rest in points]
            parts.append("<ul>\n" + "\n".join(lines) + "\n</ul>")
        else:
            parts += [f"<p>{escape(paragraph)}</p>" for paragraph in section.paragraphs]
        if section.picture is not None:
            parts.append(_picture(section, light[section.picture], dark[section.picture]))
        if section.table:
            parts.append(_table(section))
    return "\n".join([*parts, "</body>\n</html>\n"])


def markdown(located: Located) -> str:
    """The same in Markdown, with the pictures beside it; the table of the logit lens is the page's alone."""
    parts = [f"# {title(located)}", f"**{summary(located)}**", subject_line(located)]
    if located.subject.command:
        parts.append(f"Made with `{located.subject.command}`.")
    for section in sections(located):
        if section.picture is None and section.table:
            continue
        parts.append(f"## {section.heading}")
        if section.listed:
            points = [paragraph.partition(":") for paragraph in section.paragraphs]
            parts.append("\n".join(f"- **{name}{colon}**{rest}" for name, colon, rest in points))
        else:
            parts += section.paragraphs
        if section.picture is not None:
            parts.append(f"![{section.shows}]({section.picture}.png)")
        if section.table:
            head, *rows = section.table
            lines = ["| " + " | ".join(row) + " |" for row in (head, tuple("---" for _ in head), *rows)]
            parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _picture(section: Section, light: bytes, dark: bytes) -> str:
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_inline(dark)}">'
        f'<img src="{_inline(light)}" alt="{escape(section.shows)}"></picture>'
    )


def _inline(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _table(section: Section) -> str:
    head, *rows = section.table
    lens = section.picture is None
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for first, *rest in rows:
        cells = [f"<td>{escape(first)}</td>"]
        for cell in rest:
            mark = ' class="readable"' if lens and is_readable(cell) else ""
            cells.append(f"<td{mark}>{escape(cell)}</td>")
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"
