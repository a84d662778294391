"""Run in a fresh process: load a patched directory as a user would, and say what it does.

Imports torch and transformers alone. Prints one JSON object as its last line.

Usage: python -I fresh.py DIRECTORY DTYPE DEVICE TOKENS
"""

import json
import sys
from pathlib import Path
from typing import Any


def main(directory: str, dtype: str, device: str, tokens: int) -> dict[str, Any]:
    import torch
    import transformers
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    transformers.logging.set_verbosity_error()
    config = json.loads(Path(directory, "config.json").read_text(encoding="utf-8"))
    result: dict[str, Any] = {"bypasses": {}}
    stock = getattr(transformers, config["architectures"][0].removeprefix("Sasa"))
    attempts = {
        "without trust_remote_code": lambda: AutoModelForImageTextToText.from_pretrained(
            directory, trust_remote_code=False
        ),
        f"through {stock.__name__}": lambda: stock.from_pretrained(directory),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
            result["bypasses"][name] = "loaded"
        except Exception as error:  # whatever it is, it did not load
            result["bypasses"][name] = f"{type(error).__name__}"

    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=False)
    processor.tokenizer.padding_side = "left"
    model = AutoModelForImageTextToText.from_pretrained(
        directory, trust_remote_code=True, dtype=getattr(torch, dtype), device_map=device
    )
    result["model_class"] = type(model).__name__
    result["probe_dtype"] = str(model.sasa.probe.weight.dtype)
    folder = Path(directory, "sasa-verify")
    result["cases"] = []
    for case in json.loads((folder / "cases.json").read_text(encoding="utf-8"))["cases"]:
        content = [{"type": "text", "text": case["prompt"]}]
        if case["image"]:
            content.insert(0, {"type": "image", "image": Image.open(folder / case["image"]).convert("RGB")})
        inputs = processor.apply_chat_template(
            [[{"role": "user", "content": content}]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"padding": True, "return_tensors": "pt"},
        )
        device = model.device if model.device.type != "meta" else "cpu"  # where the first weights lie on disk
        inputs = {
            name: value.to(device, model.dtype) if value.is_floating_point() else value.to(device)
            for name, value in inputs.items()
        }
        with torch.no_grad():
            probability = model(**inputs).unsafe_probability[0].item()
            answer = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, num_beams=1)
        answer = answer[0, inputs["input_ids"].shape[1] :].tolist()
        result["cases"].append({"unsafe_probability": probability, "tokens": answer})
    return result


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))))
