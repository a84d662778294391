"""Reports of locate and evaluate. The text lies in templates/; theme.py gives the style of the pictures."""

import base64
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from sasa_export.files import staged
from sasa_export.flags import flag
from sasa_export.manifest import write_manifest
from sasa_export.writers import card

TEMPLATES = Path(__file__).with_name("templates")
SPARE_BYTES = 20_000_000  # disk space for any report
LEFT_OUT = ("model", "out", "force", "device")  # options that `made_with` writes itself or leaves out


def write_report(
    options: Any, name: str, title: str, figures: dict[str, Any], files: Mapping[str, bytes], **values: Any
) -> None:
    """Write the directory `options.out`: report.md from the template NAME.md.j2 and `values`, report.html with the
    pictures embedded, all `files` (among them the pictures), and NAME.json with all `figures`."""
    text = render(f"{name}.md.j2", **values)
    data = {"tool": f"sasa-export {version('sasa-export')}", **jsonable(figures)}
    written = {
        **files,
        "report.md": text.encode(),
        "report.html": html_page(title, text, files).encode(),
        f"{name}.json": f"{json.dumps(data, indent=1, ensure_ascii=False)}\n".encode(),
    }
    with staged(options.out, force=options.force, needed_bytes=SPARE_BYTES) as staging:
        for file, content in written.items():
            (staging / file).write_bytes(content)
        write_manifest(staging, {})


def render(template: str, **values: Any) -> str:
    """Return the text of a template. Markdown templates must pass foreign text through the filter `plain`."""
    return card.render(TEMPLATES, template, {"plain": plain}, **values)


def plain(text: str) -> str:
    """Return text with Markdown's special characters escaped. It is safe in tables, too."""
    return re.sub(r"([\\`*\[\]<>&~|]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", " ".join(text.split()))


def html_page(title: str, markdown: str, files: Mapping[str, bytes]) -> str:
    """Return a Markdown report as one HTML page that loads nothing: pictures among the files are embedded."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    for name, data in files.items():
        body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{base64.b64encode(data).decode()}"')
    return render("page.html.j2", title=title, body=body)


def jsonable(value: Any) -> Any:
    """Return a value as plain data, with numbers rounded to six decimals. Estimates lose their influence."""
    if is_dataclass(value):
        value = {name: part for name, part in vars(value).items() if name != "influence"}
    if isinstance(value, dict):
        return {name: jsonable(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(part) for part in value]
    return round(value, 6) if isinstance(value, float) else value


def last_name(model: str) -> str:
    """Return a hub id unchanged, and a directory's name without its path, which is private."""
    return Path(model).resolve().name if Path(model).exists() else model


def made_with(name: str, options: Any) -> str:
    """Return the command that makes a report again, and versions of packages. The command is `sasa-export NAME` with
    the options (a dataclass) that differ from the defaults. Model and files have no directories, the output is
    `report`, and data is named as it was given.
    """
    parts = ["sasa-export", name, "--model", last_name(str(options.model))]
    for entry in fields(options):
        value = getattr(options, entry.name)
        if entry.name in LEFT_OUT or value == entry.default:
            continue
        if value is True:
            parts.append(flag(entry.name))
        else:
            for item in value if isinstance(value, tuple) else (value,):
                parts += [flag(entry.name), item.name if isinstance(item, Path) else str(item)]
    versions = ", ".join(f"{package} {version(package)}" for package in ("sasa-export", "torch", "transformers"))
    return f"`{shlex.join([*parts, '--out', 'report'])}`, {versions}"
