"""Ask an exported directory with plain onnxruntime-genai.

    python ask.py DIRECTORY < REQUESTS

Reads a JSON list of {"turns": [rows of token ids, ...], "pixels": of the first turn's pictures or null, "places": how
many of its tokens are theirs, "tokens": how many to say, "options": of the search}, where a turn's rows, (batch,
tokens), are equally long. Prints a JSON list with a list for each: in each turn `probability` (batch,) and `tokens`,
rows of what was said.
"""

import json
import sys
from typing import Any

import numpy as np
import onnxruntime_genai as og


def judged(generator: og.Generator) -> list[float] | None:
    """The output `unsafe_probability`, which an unguarded model does not have."""
    try:
        return generator.get_output("unsafe_probability").tolist()
    except Exception:
        return None


model = og.Model(sys.argv[1])
said = []
for request in json.load(sys.stdin):
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(batch_size=len(request["turns"][0]), **request["options"])
    generator = og.Generator(model, parameters)
    answers: list[dict[str, Any]] = []
    for rows in request["turns"]:
        if answers and not generator.is_done():
            generator.get_logits()  # feeds the last token of an answer that was cut short
        ids = np.array(rows, np.int32)
        if request["pixels"] is None or answers:
            generator.append_tokens(ids)
        else:
            inputs = og.NamedTensors()
            inputs["input_ids"], inputs["pixel_values"] = ids, np.array(request["pixels"], np.float32)
            inputs["num_image_tokens"] = np.array([request["places"]])
            generator.set_inputs(inputs)
        probability = judged(generator)
        answer: list[list[int]] = []
        while len(answer) < request["tokens"] and not generator.is_done():
            generator.generate_next_token()
            answer.append(generator.get_next_tokens().tolist())
        answers.append({"probability": probability, "tokens": np.transpose(answer).tolist()})
    said.append(answers)
print(json.dumps(said))
