"""Writes the reference: what Python code may use, the gate's settings in config.json, and the command line.

python tools/write_api.py docs/reference
"""

import inspect
import json
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import click
import jinja2

import sasa_export
from sasa_export.cli import main
from sasa_export.gate import GateSpec
from sasa_export.report import Check
from sasa_export.runtime.model import GuardedModel
from sasa_export.runtime.settings import OPERATOR
from sasa_export.writers.directory import Patch

TEMPLATE = """\
# Python

Written by `make api` from the docstrings. The rest of `sasa_export` may change in any version.

```python
{{ example }}
```
{% for name, thing in ours.items() %}
## `{{ name }}{{ signature(thing) }}`

{{ doc(thing) }}
{% endfor %}
## `Options(...)`

{{ doc(options) }} They are those of the command line (`sasa-export --help-all`). `options.check()` raises
SasaExportError where they contradict each other.

| field | type | default | |
|---|---|---|---|
{% for field in fields(options) -%}
| `{{ field.name }}` | `{{ cell(field.type) }}` | {{ default(field) }} | {{ cell(field.metadata.help) }} |
{% endfor %}
## A patched model

What `from_pretrained(..., trust_remote_code=True)` gives is a model of transformers, with more in these places. Its
`config.sasa` has threshold, refusal and gate, and `from_pretrained(..., sasa={"threshold": 0.5})` gives others for one
load. Every call's output has `unsafe_probability`, (batch,), NaN where no verdict is due.
{% for name, thing in theirs.items() %}
### `model.{{ name }}{{ signature(thing) }}`

{{ doc(thing) }}
{% endfor %}"""

GATE = """\
# The gate's settings in config.json

Written by `make api` from `sasa_export/gate.py`. A patched directory's config.json holds these under `sasa`. Whoever
runs the model may edit those in bold, there or for one load with `from_pretrained(..., sasa={"threshold": 0.3})`.
ONNX graphs hold their settings within themselves, and are exported again instead.

| setting | type | default | |
|---|---|---|---|
{% for field in fields(gate) -%}
| {{ ("**`%s`**" if field.name in operator else "`%s`") | format(field.name) }} | `{{ cell(field.type) }}` {# -#}
| {{ preset(field) }} | {{ cell(field.metadata.help) }} |
{% endfor %}"""

COMMANDS = """\
# Command line

Written by `make api` from the commands. `sasa-export --help` shows the common options alone, `--help-all` all of them.
Every command ends with 0 where all went well, and with 1 or 2 and one line on standard error where not.
{% for name, command in commands.items() %}
## `{{ name }}`

{{ help(command) }}

| option | default | |
|---|---|---|
{% for option in options(command) -%}
| `{{ option.opts[-1] }}`{{ argument(option) }} | {{ shown(option) }} | {{ cell(option.help or "") }} |
{% endfor %}
{%- endfor %}"""


def signature(thing: Any) -> str:
    """The arguments of a function, without types; of a class of exceptions, nothing."""
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return ""
    given = inspect.signature(thing)
    plain = [value.replace(annotation=value.empty) for name, value in given.parameters.items() if name != "self"]
    return str(given.replace(parameters=plain, return_annotation=given.empty))


def default(field: Any) -> str:
    return "required" if field.metadata["click"].get("required") else f"`{field.default!r}`"


def preset(field: Any) -> str:
    return "" if field.default is MISSING else f"`{json.dumps(field.default)}`"


def cell(text: Any) -> str:
    return str(text).replace("|", "\\|")


def gate_page() -> str:
    return jinja2.Template(GATE, keep_trailing_newline=True).render(
        gate=GateSpec, operator=OPERATOR, fields=fields, preset=preset, cell=cell
    )


def described(command: click.Command) -> str:
    """A command's help, in Markdown: what click does not wrap is code."""
    parts = inspect.cleandoc(command.help or "").split("\n\n")
    return "\n\n".join(f"```{part[1:]}\n```" if part.startswith("\b") else part for part in parts)


def commands_page() -> str:
    """Every command with its options, and what a default and a value look like."""
    commands = {"sasa-export": main} | {f"sasa-export {name}": command for name, command in main.commands.items()}
    return jinja2.Template(COMMANDS, keep_trailing_newline=True).render(
        commands=commands,
        help=described,
        options=lambda command: [it for it in command.params if isinstance(it, click.Option)],
        argument=lambda option: "" if option.is_flag else f" `{cell(option.make_metavar(click.Context(main)))}`",
        shown=lambda option: f"`{option.default}`" if option.show_default and not option.is_flag else "",
        cell=cell,
    )


def page() -> str:
    ours = {"patch": sasa_export.patch, "Patch": Patch, "verify_directory": sasa_export.verify_directory}
    return jinja2.Template(TEMPLATE, keep_trailing_newline=True).render(
        ours={**ours, "Check": Check, "SasaExportError": sasa_export.SasaExportError},
        theirs={name: getattr(GuardedModel, name) for name in ("generate", "judge")},
        example=(sasa_export.__doc__ or "").partition("\n\n")[2].strip(),
        options=sasa_export.Options,
        signature=signature, doc=inspect.getdoc, fields=fields, default=default, cell=cell,
    )  # fmt: skip


PAGES = {"python.md": page, "gate.md": gate_page, "command-line.md": commands_page}

if __name__ == "__main__":
    for name, made in PAGES.items():
        Path(sys.argv[1], name).write_text(made(), encoding="utf-8")
