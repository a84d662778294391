"""Writes docs/api.md, what Python code may use, from docstrings and options.

python tools/write_api.py docs/api.md
"""

import inspect
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import jinja2

import sasa_export
from sasa_export.report import Check
from sasa_export.runtime.model import GuardedModel
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


def signature(thing: Any) -> str:
    """The arguments of a function, without types; of a class of exceptions, nothing."""
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return ""
    given = inspect.signature(thing)
    plain = [value.replace(annotation=value.empty) for name, value in given.parameters.items() if name != "self"]
    return str(given.replace(parameters=plain, return_annotation=given.empty))


def default(field: Any) -> str:
    return "required" if field.metadata["click"].get("required") else f"`{field.default!r}`"


def cell(text: Any) -> str:
    return str(text).replace("|", "\\|")


def page() -> str:
    ours = {"patch": sasa_export.patch, "Patch": Patch, "verify_directory": sasa_export.verify_directory}
    return jinja2.Template(TEMPLATE, keep_trailing_newline=True).render(
        ours={**ours, "Check": Check, "SasaExportError": sasa_export.SasaExportError},
        theirs={name: getattr(GuardedModel, name) for name in ("generate", "judge")},
        example=(sasa_export.__doc__ or "").partition("\n\n")[2].strip(),
        options=sasa_export.Options,
        signature=signature, doc=inspect.getdoc, fields=fields, default=default, cell=cell,
    )  # fmt: skip


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
