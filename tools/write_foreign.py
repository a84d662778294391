"""Writes docs/foreign-graphs.md from a run of the graphs that others exported.

    python tools/write_foreign.py build/foreign docs/foreign-graphs.md build/foreign.xml...

Exits with 1 where a graph failed or was never run; the table is written all the same.
"""

import json
import sys
from pathlib import Path

import jinja2
from write_matrix import results

TESTS = {
    "oracle": ("test_verdicts",),
    "right pads": ("test_padding[right-{}]",),
    "left pads": ("test_padding[left-{}]",),
    "answers": ("test_allowed_answers",),
    "refusals": ("test_refusals",),
    "pieces": ("test_pieces",),
    "second turn": ("test_second_turns",),
    "files": ("test_the_weights_stay_as_they_are",),
}
TITLES = {
    "builder": "onnxruntime-genai's builder (0.18.0, for CPUs)",
    "optimum": "optimum-onnx (0.1.0, with optimum 2.1.0 and transformers 4.57.6)",
}

TEMPLATE = """\
# Graphs that others exported

Written from a test run, `make foreign` for all of it: one row a decoder, exported by somebody else's tool, patched
by `sasa-export --model directory/ --out patched/`, and run in onnxruntime on a CPU. `smol-llava` is the language model
of the embedded model; the others are tiny and random.

- *Oracle*: P(unsafe) is that of two full passes, in torch on the weights that the graph was made of (within 1e-4); of
  float16 and int4, and where the exporter left something of the model out, in the graph as it was (in float16 within
  {{ tolerance.float16 }}, in int4 {{ tolerance.int4 }}).
- *Right pads*, *left pads*: so it is in a batch of prompts of different lengths.
- *Answers*: of allowed prompts, the logits and the caches of twenty tokens are the original's to the bit.
- *Refusals*: refused prompts say the whole refusal, and nothing else.
- *Pieces*, *second turn*: the same verdict for a prompt in pieces of random lengths; a verdict over the whole
  conversation for a question on a kept cache. In int4 within 0.05: its products round by the number of tokens in a
  call.
- *Files*: the weights lie in the original's file, and the new graph adds less than 2 MB.

✓: it held; ✗: it did not; ·: it was not run; –: the original cannot either, or the decoder is
[refused](foreign.md#what-is-refused).
{% for exporter, found in tables.items() %}
## {{ titles[exporter] }}

| decoder | {{ tests | join(" | ") }} |
|---|{{ "---|" * (tests | length) }}
{% for name, marks in found.items() -%}
| {{ name }} | {{ marks | join(" | ") }} |
{% endfor %}
Families of which it could not export these tiny models: {{ missing[exporter] | join(", ") }}.
{% endfor %}"""


def main(root: Path, out: Path, reports: list[Path]) -> None:
    sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / place) for place in ("", "foreign")]
    from test_foreign_graphs import TOLERANCE

    marks: dict[str, str] = {}
    for report in reports:
        marks |= results(report)
    tables: dict[str, dict[str, list[str]]] = {}
    missing: dict[str, list[str]] = {}
    for exporter in TITLES:
        said = json.loads((root / f"{exporter}.json").read_text())
        names = sorted(name for name, what in said.items() if what == "ok" and not name.endswith("dynamic"))
        missing[exporter] = [name for name in said if said[name] != "ok"]
        tables[exporter] = {
            name: [marks.get(_named(test, f"{exporter}-{name}"), "·") for (test,) in TESTS.values()] for name in names
        }
    text = jinja2.Template(TEMPLATE, keep_trailing_newline=True).render(
        tables=tables, tests=list(TESTS), titles=TITLES, missing=missing, tolerance=TOLERANCE
    )
    out.write_text(text, encoding="utf-8")
    bad = {"✗", "·"}
    wrong = [f"{exporter} {name}" for exporter, found in tables.items() for name in found if bad & {*found[name]}]
    sys.exit("\n".join(wrong) or None)


def _named(test: str, graph: str) -> str:
    return test.format(graph) if "{}" in test else f"{test}[{graph}]"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
