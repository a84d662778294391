"""The model card: what was done, what was measured, what it does not do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sasa_export.graph import LayerGraph, blocks_again
from sasa_export.graph.diagram import mermaid
from sasa_export.models import Source
from sasa_export.probe import Calibration
from sasa_export.probe.figures import verdict_on_projection

if TYPE_CHECKING:
    from sasa_export.verify.check import Check

LIMITS = """\
- However a prompt is fed, its verdict is the same: whole, in pieces, over turns on a kept cache, after a rewind, as
  ids or as embeddings. It ends where the chat template's generation prompt is complete, and every new turn is judged
  on the whole conversation. Text without that generation prompt is judged by `generate` where its input ends, and
  otherwise {raw}.
- As the assistant in assisted decoding it raises an error, since it would not guard the main model; as the main model
  it guards. `assistant_early_exit` and continuous (paged) batching raise an error too.
{answers}
- GGUF conversion and vLLM's transformers backend stop at this directory. Whoever takes the shards out of it and runs
  them in a model of another making has the original, without the gate.
- A probe knows what its calibration set shows it. Other languages, other attacks and other kinds of pictures are
  judged by generalisation alone: measure them before you rely on it.
"""

# How text without the generation prompt is judged by whoever does not know where it ends.
RAW = {
    "prompt": """at each call that brings several tokens, where a single token behind those counts as an answer's;
  at each token where it came one by one from the start""",
    "every-token": "at each token",
}
ANSWERS = {
    "prompt": "- The verdict is given before the first token. What the answer turns into afterwards is not judged.",
    "every-token": """- Each token of the answer is judged as well, at the prompt's threshold, which was set on prompts:
  a harmless answer may be cut off by the refusal. `sasa-export evaluate` counts how many are.""",
}

HOW = {
    "full": "Checked in a fresh process with plain `from_pretrained`, against the original model:",
    "files": "Only the files were checked (`--verify files`): **this model was never loaded, and its answers "
    "were not compared with the original's.** `sasa-export verify` does it on a machine that holds the model.",
}


def write_card(
    source: Source,
    graph: LayerGraph,
    sasa: dict[str, Any],
    calibration: Calibration | None,
    checks: Sequence[Check],
    verified: str,
    directory: Path,
) -> None:
    """Write README.md into a patched directory."""
    blocks = len(graph.of("block"))
    each = "what it did" if sasa.get("gate", "prompt") == "prompt" or sasa["safety_layer"] is None else "the second lane too"
    parts = [
        front_matter(source, "transformers"),
        f"# {source.name}, guarded by SASA\n",
        "This model judges every prompt before it answers. Text and picture run through the decoder as in the "
        f"original; then {way(sasa)} decides. A refused prompt is answered with\n",
        f"> {sasa['refusal']}\n",
        "and any other by the original model, token for token. The method is SASA (arXiv 2507.21637), written into "
        "the model by sasa-export; no fine-tuning took place, and the original's weights are unchanged.\n",
        "## Loading\n",
        "```python\nfrom transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
        'model = AutoModelForImageTextToText.from_pretrained("<this directory>", trust_remote_code=True)\n'
        'processor = AutoProcessor.from_pretrained("<this directory>")\n```\n',
        "`trust_remote_code=True` runs `modeling_sasa.py` of this directory, on torch and transformers 5 alone. "
        "Without it, or through a stock class, loading fails: there is no way to load the weights and lose the gate by "
        "accident. `forward` returns `unsafe_probability` (batch,) with the prompt's logits.\n",
        "## Layers and threshold\n",
        f"{layers(sasa, blocks)} Refused from P(unsafe) >= {sasa['threshold']:.4f} on. {cost(sasa, blocks)}; each "
        f"token after that costs {each}.\n",
        "```mermaid\n" + mermaid(graph) + "```\n",
        "## Calibration\n",
        calibration_section(calibration),
        "## Verification\n",
        verification_section(checks, HOW[verified]),
        "## Limits\n",
        LIMITS.format(raw=RAW[sasa.get("gate", "prompt")], answers=ANSWERS[sasa.get("gate", "prompt")]),
    ]
    (directory / "README.md").write_text("\n".join(parts), encoding="utf-8")


def way(sasa: dict[str, Any]) -> str:
    """How the verdict comes about, for a sentence that ends in "decides"."""
    if sasa["safety_layer"] is None:
        return f"a linear probe on {_read(sasa)}, read at the end of the main lane without any projection,"
    pairs = "".join(f", that of block {safety} onto that of {semantic}" for safety, semantic in _further(sasa))
    return (
        f"the output of the safety layer (block {sasa['safety_layer']}, zero-based) is projected onto that of the "
        f"semantic layer (block {sasa['semantic_layer']}){pairs}, {_second_lane(sasa)} and a linear probe on "
        f"{_read(sasa)}{' of each lane' if pairs else ''}"
    )


def _further(sasa: dict[str, Any]) -> list[list[int]]:
    """Pairs of safety and semantic layer behind the first."""
    return list(sasa.get("further_pairs", []))


def _read(sasa: dict[str, Any]) -> str:
    positions = sasa.get("probe_positions", 1)
    return "the first token" if positions == 1 else f"the mean over the prompt's last {positions} tokens"


def _second_lane(sasa: dict[str, Any]) -> str:
    again = blocks_again(sasa["graph"])
    if _further(sasa):
        end = "" if sasa.get("probe_block") is None else f" up to block {sasa['probe_block']}"
        return f"the blocks behind each safety layer{end} run once more on its result,"
    if sasa.get("probe_block") is None:
        return "the blocks behind the safety layer run once more on the result,"
    if not again:
        return "no block runs on the result,"
    if len(again) == 1:
        return f"block {again[0]} runs once more on the result,"
    return f"blocks {again[0]} to {again[-1]} run once more on the result,"


def layers(sasa: dict[str, Any], blocks: int) -> str:
    """The layers and where they are from."""
    if sasa["safety_layer"] is None:
        return f"No projection, so no layers to choose among the {blocks} blocks."
    pairs = "".join(f", further pair {safety} and {semantic}" for safety, semantic in _further(sasa))
    return (
        f"Safety layer {sasa['safety_layer']}, semantic layer {sasa['semantic_layer']} of {blocks} blocks "
        f"({sasa['layers_from']}){pairs}."
    )


def cost(sasa: dict[str, Any], blocks: int) -> str:
    """The blocks that a prompt runs through."""
    if sasa["safety_layer"] is None:
        return f"Over the prompt {blocks} blocks run, as in the original"
    again = len(blocks_again(sasa["graph"]))
    return f"Over the prompt {blocks} + {again} blocks run, {(blocks + again) / blocks:.2f} times the original's"


def front_matter(source: Source, library: str, *tags: str) -> str:
    """What model hubs read: the library that loads the directory, the model it is made from, and tags."""
    base = f"base_model: {source.name}\n" if source.name.count("/") == 1 and not Path(source.name).exists() else ""
    listed = "".join(f"- {tag}\n" for tag in (*tags, "sasa", "safety"))
    return f"---\nlibrary_name: {library}\npipeline_tag: image-text-to-text\n{base}tags:\n{listed}---\n"


def calibration_section(calibration: Calibration | None) -> str:
    """The figures of the calibration as a table, and what they say."""
    if calibration is None:
        return "The probe was given (`--probe`), so nothing was measured here.\n"
    count, rate = len(calibration.prompts), calibration.max_false_positive_rate
    chosen = "The threshold was given (`--threshold`)."
    if rate is not None:
        chosen = f"The threshold allows at most {rate:.1%} of the harmless prompts to be refused in cross-validation."
    lines = [
        f"{count} labelled prompts, logistic regression on logits, five-fold cross-validation with "
        f"both members of a harmful/harmless pair in one fold. {chosen} "
        "Accuracy is taken at P = 0.5; caught and over-refused at the threshold. *Without projection* is "
        + ("the same probe" if any(figure.feature == "projected" for figure in calibration.figures) else "a probe")
        + " on the main lane, which needs no second lane.\n",
        "| feature | channel | prompts | AUC | accuracy | harmful caught | harmless over-refused |",
        "|---|---|---|---|---|---|---|",
    ]
    names = {"projected": "with projection", "plain": "without projection"}
    lines += [
        f"| {names[figure.feature]} | {figure.channel} | {figure.prompts} | {figure.auc:.3f} | {figure.accuracy:.1%} | "
        f"{figure.recall:.1%} | {figure.false_positive_rate:.1%} |"
        for figure in calibration.figures
    ]
    paper = ", ".join(f"{figure.auc:.3f} ({figure.channel})" for figure in calibration.paper)
    strength = (
        f"Regularization: C = {calibration.regularization:g}. At the paper's C = 1 the same features give "
        f"an AUC of {paper}."
    )
    return "\n".join([*lines, "", verdict_on_projection(calibration.figures), "", strength, ""])


def verification_section(checks: Sequence[Check], how: str) -> str:
    """What was checked, one line each; `how` says it in a sentence."""
    lines = [f"- {'✓' if check.passed else '✗'} {check.name}: {check.detail}" for check in checks]
    return "\n".join([how, "", *lines]) + "\n"
