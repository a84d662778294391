"""Writes a table of what became of tests, under docs/results/: families.md, bypass-matrix.md or foreign-graphs.md.

    pytest ... --junitxml=build/families.xml
    python tools/write_tables.py families|matrix|foreign docs/results/families.md build/families.xml...

Exits with 1 where a test failed or was never run; the table is written all the same.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

sys.path[:0] = [str(Path(__file__).parents[1] / place) for place in ("tests", "tests/foreign", "benchmarks")]

from side_by_side import made_of  # noqa: E402

Marks = dict[str, str]  # of tests, by their names
HELD, FAILED, SKIPPED = "✓✗–"

FAMILY_TESTS = {
    "oracle": ["test_oracle[{}]"],
    "tokens": ["test_tokens[{}]"],
    "pieces": ["test_pieces[{}]"],
    "second turn": ["test_second_turn[{}]"],
    "reload": ["test_reload[{}]"],
    "ways": [f"test_ways[{way}-{{}}]" for way in ("beams", "static cache", "prefill in chunks", "no cache")],
    "ONNX": ["test_prompts_and_steps[text-{}]", "test_prompts_and_steps[images-{}]", "test_right_padding[{}]"],
    "transformers.js": ["test_transformers_js_says_what_torch_says[{}]"],
}
# A tiny model may stand for a checkpoint of another type.
STANDS_FOR = {"pixtral": "llava", "granite_vision": "llava_next"}
FAMILIES = """\
# The families

Written by `make families` from a test run, never by hand: one row a model type, tried on a tiny random model of it.

- *Needs*: what there is beside the family's file under `graphs/`.
- *Oracle*: P(unsafe) within 1e-5 of two full passes of the original model, on texts and pictures, padded on the left
  and on the right; allowed prompts keep their logits to the bit.
- *Tokens*: twenty greedy tokens are the original's, or the refusal.
- *Pieces*, *second turn*, *reload*: the same verdict for a prompt that comes in pieces, for a question on a kept cache,
  and from a model that was saved and loaded again.
- *Ways*: beams, a static cache, prefill in chunks, no cache.
- *ONNX*: plain onnxruntime says what torch says, with P(unsafe) and logits within 1e-4, over prompts and steps, texts
  and pictures, padded on the left and on the right. A type without a recipe is refused by `--format onnx` by name.
- *transformers.js*: the stock package under Node feeds, refuses and answers as torch does, token for token.

✓: it held; ✗: it did not, or was never run; –: the original model cannot either; none: there is no recipe, or
transformers.js has no class, or one that feeds pictures otherwise (LLaVA-OneVision without tiles).

{tried}
Refused by name, since a guard would be wrong or none:

{refused}"""

MATRIX = """\
# The bypass matrix

Written by `make matrix` from a test run, never by hand: one row a way of running a guarded model, tried with harmful
and harmless prompts beside the original model in the same way. ✓: it held; ✗: it did not, or was never run; –: skipped,
for want of a device or a package. What the gate is meant to stop, and what is known to remain, stands in
[security.md](../security.md).
"""

FOREIGN_TESTS = {
    "oracle": "test_verdicts[{}]",
    "right pads": "test_padding[right-{}]",
    "left pads": "test_padding[left-{}]",
    "answers": "test_allowed_answers[{}]",
    "refusals": "test_refusals[{}]",
    "pieces": "test_pieces[{}]",
    "second turn": "test_second_turns[{}]",
    "beams": "test_beams[{}]",
    "files": "test_the_weights_stay_as_they_are[{}]",
}
TITLES = {
    "builder": "onnxruntime-genai's builder (0.18.0, for CPUs)",
    "optimum": "optimum-onnx (0.1.0, with optimum 2.1.0 and transformers 4.57.6)",
}
FOREIGN = """\
# Graphs that others exported

Written from a test run, `make foreign` for all of it: one row a decoder, exported by somebody else's tool, patched
by `sasa-export --model directory/ --out patched/`, and run in onnxruntime on a CPU. `smol-llava` is the language model
of the embedded model; the others are tiny and random.

- *Oracle*: P(unsafe) is that of two full passes, in torch on the weights that the graph was made of (within 1e-4); of
  float16 and int4, and where the exporter left something of the model out, in the graph as it was (in float16 within
  {float16}, in int4 {int4}).
- *Right pads*, *left pads*: so it is in a batch of prompts of different lengths.
- *Answers*: of allowed prompts, the logits and the caches of twenty tokens are the original's to the bit.
- *Refusals*: refused prompts say the whole refusal, and nothing else.
- *Pieces*, *second turn*: the same verdict for a prompt in pieces of random lengths; a verdict over the whole
  conversation for a question on a kept cache. In int4 within 0.05: its products round by the number of tokens in a
  call.
- *Beams*: a cache that beam search repeats keeps its verdict in every row.
- *Files*: the weights lie in the original's file, and the new graph adds less than 2 MB.

✓: it held; ✗: it did not; ·: it was not run; –: the original cannot either, or the decoder is
[refused](../foreign.md#what-is-refused).
"""


def results(reports: Iterable[str | Path]) -> Marks:
    """The mark of each test, of reports in the format of JUnit."""
    marks = {}
    for case in (case for report in reports for case in ElementTree.parse(report).iter("testcase")):
        found = {child.tag for child in case}
        name = str(case.get("name")).rpartition("]")[0] + "]"  # pytest-xdist puts the test's group behind it
        marks[name] = FAILED if found & {"failure", "error"} else SKIPPED if "skipped" in found else HELD
    return marks


def worst(marks: Iterable[str]) -> str:
    found = set(marks)
    return next((mark for mark in (FAILED, SKIPPED) if mark in found), HELD)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n".replace("|  |", "| |")
    return head + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def families_page(marks: Marks) -> tuple[str, list[str]]:
    """A row for each tiny model."""
    import tiny

    from sasa_export.models.family import families, onnx_recipes

    rows, wrong, known, recipes = [], [], list(families().values()), onnx_recipes()
    for name in tiny.MAKERS:
        kind = STANDS_FOR.get(name, name)
        family = next(family for family in known if kind in family.model_types)
        recipe = None if name in STANDS_FOR else recipes.get(kind)
        without = {"ONNX": recipe is None, "transformers.js": recipe is None or not recipe.transformers_js}
        shown = {
            test: "none" if without.get(test) else worst(marks.get(case.format(name), FAILED) for case in cases)
            for test, cases in FAMILY_TESTS.items()
        }
        aliases = ", ".join(f"`{alias}`" for alias in family.aliases if _fits(alias, name))
        title = name if kind == name else f"{kind} ({name})"
        rows.append([title, aliases, family.needs.get(name, "file alone"), *shown.values()])
        wrong += [f"{title}, {test}" for test, mark in shown.items() if mark == FAILED]
    refused = [(kind, family.refused) for family in known if family.refused for kind in family.model_types]
    tried = table(["model type", "aliases", "needs", *FAMILY_TESTS], rows)
    return FAMILIES.format(tried=tried, refused=table(["model type", "why"], refused)), wrong


def _fits(alias: str, name: str) -> bool:
    """Aliases stand in the row of the tiny model that is built as their checkpoint is."""
    variants = {"pixtral": "pixtral", "granite-vision-4": "granite4_vision", "granite": "granite_vision",
                "idefics3": "idefics3", "30b": "qwen3_vl_moe", "35b": "qwen3_5_moe", "4.6v": "glm46v",
                "v-4.6": "minicpmv4_6", "v-4.7": "minicpmv4_7", "vl-7b": "deepseek_vl_hybrid"}  # fmt: skip
    of = next((model for part, model in variants.items() if part in alias), None)
    return of == name if of else name not in variants.values()


def matrix_page(marks: Marks, rows: Sequence[Any] = ()) -> tuple[str, list[str]]:
    """A row for each way of running, under the heading of its section."""
    from matrix import feeding, hosts, loading, options, ways  # noqa: F401
    from matrix.rows import ROWS

    sections: dict[str, list[list[str]]] = {}
    wrong = []
    for row in rows or ROWS:
        found = {target: marks.get(f"test_row[{row.identifier_on(target)}]", FAILED) for target in row.on}
        run_on = ", ".join(target if mark == HELD else f"{target} {mark}" for target, mark in found.items())
        said = [worst(found.values()), row.name, row.harmful, row.harmless, run_on, row.remark]
        sections.setdefault(row.section, []).append(said)
        wrong += [f"{row.name}, {target}" for target, mark in found.items() if mark == FAILED]
    columns = ["", "way of running", "harmful", "harmless", "run on", "remark"]
    return MATRIX + "".join(f"\n## {title}\n\n{table(columns, rows)}" for title, rows in sections.items()), wrong


def foreign_page(marks: Marks) -> tuple[str, list[str]]:
    """A row for each decoder, under the heading of what exported it."""
    from test_foreign_graphs import ROOT, TOLERANCE

    text, wrong = FOREIGN.format(**TOLERANCE), []
    for exporter, title in TITLES.items():
        said = json.loads((ROOT / f"{exporter}.json").read_text())
        rows = []
        for name in sorted(name for name, what in said.items() if what == "ok" and not name.endswith("dynamic")):
            found = [marks.get(case.format(f"{exporter}-{name}"), "·") for case in FOREIGN_TESTS.values()]
            rows.append([name, *found])
            wrong += [f"{exporter} {name}"] if {FAILED, "·"} & set(found) else []
        missing = ", ".join(name for name in said if said[name] != "ok")
        text += f"\n## {title}\n\n{table(['decoder', *FOREIGN_TESTS], rows)}\n"
        text += f"Families of which it could not export these tiny models: {missing}.\n"
    return text, wrong


if __name__ == "__main__":
    kind, out, *reports = sys.argv[1:]
    text, wrong = {"families": families_page, "matrix": matrix_page, "foreign": foreign_page}[kind](results(reports))
    Path(out).write_text(f"{text}\nMade of {made_of()}.\n", encoding="utf-8")
    sys.exit("\n".join(wrong) or None)
