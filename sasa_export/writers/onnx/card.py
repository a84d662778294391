"""The model card of an ONNX directory: what it is, how to run it, what was measured, what it does not do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sasa_export.models import Source
from sasa_export.options import Options
from sasa_export.probe import Calibration
from sasa_export.writers.card import (
    ANSWERS,
    RAW,
    calibration_section,
    cost,
    front_matter,
    layers,
    verification_section,
    way,
)
from sasa_export.writers.onnx import SUFFIX

if TYPE_CHECKING:
    from sasa_export.verify.check import Check
    from sasa_export.verify.flips import Flips

HOW = {
    "full": "Checked with plain onnxruntime in a fresh process, against what the original model said in torch:",
    "files": "Only the graphs were checked (`--verify files`): **they were never run, and their answers were not "
    "compared with the original's.**",
}
TYPES = {
    "float32": "Weights and arithmetic are float32.",
    "float16": "Weights, states and cache are float16.",
    "bfloat16": "Weights, states and cache are bfloat16, which onnxruntime runs on the CUDA provider alone.",
    "int8": "The weights of the matrix products are int8 in blocks of 32, everything else is float32.",
    "int4": "The weights of the matrix products are int4 in blocks of 32, everything else is float32.",
}
JAVASCRIPT_TYPES = {"float32": "fp32", "float16": "fp16", "int8": "int8", "int4": "q4"}
# How the stock processor is called, and how far each family was run in transformers.js 4.3.1.
JAVASCRIPT_FAMILIES = {
    "llava": (
        "picture, text",
        "as examples/transformers_js of sasa-export, which was run with a small LLaVA in float32",
    ),
    **dict.fromkeys(("smolvlm", "idefics3"), ("text, [picture]", "run with a tiny random model in float32")),
    "gemma3": (
        "text, [picture]",
        "run with a tiny random model in float32; it does not tell the decoder which tokens are a picture's, so these "
        "do not see each other both ways, and P(unsafe) is not quite the original's",
    ),
    "qwen2_5_vl": (
        "text, [picture]",
        "run with a tiny random model in float32; it counts the positions of an answer to text alone wrongly, guarded "
        "or not, from the second token on",
    ),
}
NUMPY_TYPES = {"float16": "np.float16"}

PYTHON = """\
```python
import json

import numpy as np
import onnxruntime
from PIL import Image
from transformers import AutoProcessor

directory = "<this directory>"
vision, embedding, decoder = (
    onnxruntime.InferenceSession(f"{{directory}}/onnx/{{name}}{suffix}.onnx")
    for name in ("vision_encoder", "embed_tokens", "decoder_model_merged")
)
processor = AutoProcessor.from_pretrained(directory)
config = json.load(open(f"{{directory}}/config.json"))
image_token = config.get("image_token_id") or config["image_token_index"]
ends = json.load(open(f"{{directory}}/generation_config.json"))["eos_token_id"]

content = [
    {{"type": "image", "image": Image.open("picture.png")}},
    {{"type": "text", "text": "Follow the instruction shown in the image."}},
]
inputs = processor.apply_chat_template(
    [[{{"role": "user", "content": content}}]], add_generation_prompt=True, tokenize=True, return_dict=True,
    processor_kwargs={{"return_tensors": "np"}},
)
types = {{"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}}
feed = {{value.name: inputs[value.name].astype(types[value.type]) for value in vision.get_inputs()}}
features = vision.run(None, feed)[0]
embeds = embedding.run(None, {{"input_ids": inputs["input_ids"].astype(np.int64)}})[0]
embeds[inputs["input_ids"] == image_token] = features.reshape(-1, features.shape[-1])
cache = {{
    value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), {state})
    for value in decoder.get_inputs()
    if value.name.startswith("past_key_values.")
}}
optional = [value.name for value in decoder.get_overridable_initializers()]
extra = {{name: inputs[name].astype(np.int64) for name in optional if name in inputs}}
names = [value.name for value in decoder.get_outputs()]
length, answer = 0, []
for _ in range(100):
    positions = np.arange(length, length + embeds.shape[1])[None]
    length += embeds.shape[1]
    feed = {{"inputs_embeds": embeds, "attention_mask": np.ones((1, length), np.int64), "position_ids": positions}}
    values = dict(zip(names, decoder.run(None, {{**feed, **extra, **cache}})))
    cache = {{name: values[name.replace("past_key_values", "present")] for name in cache}}
    answer.append(int(values["logits"][0, -1].argmax()))
    if answer[-1] in (ends if isinstance(ends, list) else [ends]):
        break
    embeds, extra = embedding.run(None, {{"input_ids": np.array([answer[-1:]])}})[0], {{}}
print(processor.tokenizer.decode(answer, skip_special_tokens=True))
```
"""
JAVASCRIPT = """\
```js
import {{ AutoProcessor, {model}, RawImage, env }} from "@huggingface/transformers";

env.localModelPath = "<the folder that holds this directory>";
const name = "<this directory's name>";
const processor = await AutoProcessor.from_pretrained(name);
const model = await {model}.from_pretrained(name, {{ dtype: "{dtype}", device: "cpu" }});
const content = [{{ type: "image" }}, {{ type: "text", text: "Follow the instruction shown in the image." }}];
const text = processor.apply_chat_template([{{ role: "user", content }}], {{ add_generation_prompt: true }});
const picture = await RawImage.read("picture.png");
const inputs = await processor({inputs}, {{ add_special_tokens: false }});
const output = await model.generate({{ ...inputs, max_new_tokens: 100, do_sample: false }});
console.log(processor.batch_decode(output, {{ skip_special_tokens: true }})[0]);
```
"""

BELONGS = {
    "prompt": "the call that completes a prompt; in all others it is NaN",
    "every-token": "each call: it is the largest over the tokens that the call judges",
}
LIMITS = """\
- However a prompt is fed, its verdict is the same: whole, in pieces, over turns on a kept cache, after a rewind. It
  ends where the chat template's generation prompt is complete, which the decoder recognises by its embeddings; every
  new turn is judged on the whole conversation. Text without that generation prompt is judged {raw}.
- `unsafe_probability` (batch,) belongs to {belongs}.
- What the gate keeps of each token travels in the last layers of the cache. A runtime must carry them as it carries
  the others; without them calls are refused or fail. `num_hidden_layers` in config.json counts them.
- Whoever edits the graph, or feeds embeddings and a cache of their own making, can go around the gate.
{answers}
- A probe knows what its calibration set shows it. Other languages, other attacks and other kinds of pictures are
  judged by generalisation alone: measure them before you rely on it.
- Only the CPU provider was run while this was exported, unless the section above says otherwise. Placement on the
  CUDA provider was not looked at.
"""


def write_onnx_card(
    source: Source,
    sasa: dict[str, Any],
    calibration: Calibration | None,
    checks: Sequence[Check],
    flips: Flips | None,
    options: Options,
    directory: Path,
) -> None:
    """Write README.md into an ONNX directory; where `flips` were counted, `checks` say how many."""
    dtype, gate = options.onnx_dtype, sasa.get("gate", "prompt")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    blocks = sum(node["op"] == "block" for node in sasa["graph"])
    parts = [
        front_matter(source, "onnx", "onnx"),
        f"# {source.name} in ONNX, guarded by SASA\n",
        "Three graphs, `vision_encoder`, `embed_tokens` and `decoder_model_merged`, with the names that ONNX runtimes "
        f"look for. The decoder judges every prompt before it answers: {way(sasa)} decides. A refused prompt is "
        "answered with\n",
        f"> {sasa['refusal']}\n",
        "by the graph's own logits, and any other by the original's. No code comes with it and no runtime has to know: "
        "whoever drives the graphs gets the guarded model. The method is SASA (arXiv 2507.21637), built in by "
        "sasa-export without fine-tuning.\n",
        f"Opset {options.opset}, {dtype}. {TYPES[dtype]} Projection, probe and threshold are float32. Refused from "
        f"P(unsafe) >= {sasa['threshold']:.4f} on. {layers(sasa, blocks)} {cost(sasa, blocks)}; {_each_token(sasa)}.\n",
        "## Running\n",
        _running(config, dtype),
        "## Calibration\n",
        calibration_section(calibration),
        "## Verification\n",
        verification_section(checks, HOW[options.verify]),
        *([f"{not_counted(options).capitalize()}\n"] if flips is None else []),
        "## Limits\n",
        LIMITS.format(raw=RAW[gate], belongs=BELONGS[gate], answers=ANSWERS[gate]),
    ]
    (directory / "README.md").write_text("\n".join(parts), encoding="utf-8")


def _each_token(sasa: dict[str, Any]) -> str:
    """What the tokens of an answer cost."""
    if sasa.get("gate", "prompt") == "prompt":
        return "what only the verdict needs lies in one `If`, so each token after that costs about what it did"
    if sasa["safety_layer"] is None:
        return "each token after that runs through as many"
    return (
        "each token after that runs through as many. Behind the semantic layer both lanes are one batch, so the "
        "weights of those blocks are read once"
    )


def not_counted(options: Options) -> str:
    """Why there is no share of verdicts that the type turned over."""
    if options.probe is not None:
        return "no flipped verdicts were counted: the probe was given, so there are no calibration prompts."
    return "no flipped verdicts were counted: the graphs were not run."


def _running(config: dict[str, Any], dtype: str) -> str:
    """How to run it, as far as somebody has."""
    from sasa_export.writers.onnx.recipes import recipe_of

    parts = []
    if recipe_of(config["model_type"]).position_axes > 1:
        parts.append(
            "With plain onnxruntime: `position_ids` has three axes (time, height, width), (3, batch_size, "
            "sequence_length), as transformers' `get_rope_index` gives them. The graphs name their other inputs.\n"
        )
    elif dtype == "bfloat16":
        parts.append("With plain onnxruntime on the CUDA provider: the cache is bfloat16, so it travels as OrtValue.\n")
    else:
        parts.append("With plain onnxruntime:\n")
        parts.append(PYTHON.format(suffix=SUFFIX[dtype], state=NUMPY_TYPES.get(dtype, "np.float32")))
    parts += _javascript(config, dtype)
    return "\n".join(parts)


def _javascript(config: dict[str, Any], dtype: str) -> list[str]:
    """How to run it in transformers.js, where that knows the family and the type."""
    family = config["model_type"]
    if dtype not in JAVASCRIPT_TYPES:
        return []
    if family not in JAVASCRIPT_FAMILIES:
        return ["transformers.js (4.3.1) has no class for this family.\n"]
    inputs, said = JAVASCRIPT_FAMILIES[family]
    code = JAVASCRIPT.format(model=config["architectures"][0], dtype=JAVASCRIPT_TYPES[dtype], inputs=inputs)
    return [f"With transformers.js ({said}):\n", code]
