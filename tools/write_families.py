"""Writes docs/families.md from a run of the tests of families, and of ONNX.

    pytest tests/runtime/test_families.py tests/onnx_format/test_onnx_[pr]*.py --junitxml=build/families.xml
    python tools/write_families.py build/families.xml docs/families.md

Exits with 1 where a test failed or was never run; the table is written all the same.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import jinja2

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny
from onnx_runner import JAVASCRIPT
from write_matrix import results

from sasa_export.models.family import families
from sasa_export.writers.onnx.recipes import RECIPES

TESTS = {
    "oracle": ("test_oracle",),
    "tokens": ("test_tokens",),
    "pieces": ("test_pieces",),
    "second turn": ("test_second_turn",),
    "reload": ("test_reload",),
    "ways": tuple(f"test_ways[{way}]" for way in ("beams", "static cache", "prefill in chunks", "no cache")),
}
# The same of runtimes, for the types that they can hold.
RUNTIMES = {
    "ONNX": ("test_prompts_and_steps[text]", "test_prompts_and_steps[images]", "test_right_padding"),
    "transformers.js": ("test_transformers_js_says_what_torch_says",),
}
# What a type needs beside its file under graphs/; a tiny model may stand for a checkpoint of another type.
NEEDS = {
    "llama4": "masks made by the outermost module that holds the blocks; transformers 5.23, since 5.24.0 fails on it",
    "gemma3": "types of tokens kept for the second lane",
    "qwen3_vl": "a trace with a picture; a safety layer behind what a picture adds between blocks",
    "qwen3_vl_moe": "as qwen3_vl",
    "qwen3_5": "padding in a prompt's first piece, as in the original",
    "qwen3_5_moe": "padding in a prompt's first piece, as in the original",
    "lfm2_vl": "padding in a prompt's first piece, as in the original",
    "lfm3_vl": "padding in a prompt's first piece, as in the original",
    "minicpmv4_6": "padding in a prompt's first piece, as in the original",
    "minicpmv4_7": "padding in a prompt's first piece, as in the original; a trace that rounds positions",
    "granite4_vision": "as qwen3_vl; logits that are scaled behind the head",
    "perception_lm": "the timm package, for its tower; tried with CLIP in its place",
    "molmo2": "a tensor of the files that makes several of the model",
    "ernie4_5_vl_moe": "types of tokens, by which its experts run, in the second lane too",
    "kimi_k25": "a tensor of the files that makes several of the model",
}
STANDS_FOR = {"pixtral": "llava", "granite_vision": "llava_next"}

TEMPLATE = """\
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

| model type | aliases | needs | {{ tests | join(" | ") }} |
|---|---|---|{{ "---|" * (tests | length) }}
{% for row in rows -%}
| {{ row.type }} | {{ row.aliases }} | {{ row.needs }} | {{ row.marks.values() | join(" | ") }} |
{% endfor %}
Refused by name, since a guard would be wrong or none:

| model type | why |
|---|---|
{% for type, why in refused.items() -%}
| {{ type }} | {{ why }} |
{% endfor %}"""


class Row(NamedTuple):
    type: str
    aliases: str
    needs: str
    marks: dict[str, str]


def rows(marks: dict[str, str]) -> list[Row]:
    """A row for each tiny model, given the mark of each test by its name."""
    found = []
    for name in tiny.MAKERS:
        kind = STANDS_FOR.get(name, name)
        family = next(family for family in families().values() if kind in family.model_types)
        each = {test: _worst([marks.get(_of(case, name), "✗") for case in cases]) for test, cases in TESTS.items()}
        tried = {"ONNX": kind in RECIPES and name not in STANDS_FOR, "transformers.js": name in JAVASCRIPT}
        for runtime, cases in RUNTIMES.items():
            found_there = _worst([marks.get(_of(case, name), "✗") for case in cases])
            each[runtime] = found_there if tried[runtime] else "none"
        shown = ", ".join(f"`{alias}`" for alias in family.aliases if _fits(alias, name, family.model_types))
        title = name if kind == name else f"{kind} ({name})"
        found.append(Row(title, shown, NEEDS.get(name, "file alone"), each))
    return found


def _of(case: str, name: str) -> str:
    test, _, way = case.removesuffix("]").partition("[")
    return f"{test}[{way}-{name}]" if way else f"{test}[{name}]"


def _worst(marks: list[str]) -> str:
    return next((mark for mark in ("✗", "–") if mark in marks), "✓")


def _fits(alias: str, name: str, types: tuple[str, ...]) -> bool:
    """Aliases stand in the row of the tiny model that is built as their checkpoint is."""
    variants = {"pixtral": "pixtral", "granite-vision-4": "granite4_vision", "granite": "granite_vision",
                "idefics3": "idefics3", "30b": "qwen3_vl_moe", "35b": "qwen3_5_moe", "4.6v": "glm46v",
                "v-4.6": "minicpmv4_6", "v-4.7": "minicpmv4_7", "vl-7b": "deepseek_vl_hybrid"}  # fmt: skip
    of = next((model for part, model in variants.items() if part in alias), None)
    return of == name if of else name not in variants.values()


if __name__ == "__main__":
    table = rows(results(Path(sys.argv[1])))
    refused = {kind: family.refused for family in families().values() if family.refused for kind in family.model_types}
    text = jinja2.Template(TEMPLATE, keep_trailing_newline=True).render(
        rows=table, tests=[*TESTS, *RUNTIMES], refused=refused
    )
    Path(sys.argv[2]).write_text(text, encoding="utf-8")
    wrong = [f"{row.type}, {test}" for row in table for test, mark in row.marks.items() if mark == "✗"]
    sys.exit("\n".join(wrong) or None)
