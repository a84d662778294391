"""What transformers says to the demo's sixteen requests, for the tests in mlx-vlm.

Runs in sasa-export's environment: python mlx-tests/reference.py OUT. OUT then holds smol-llava as `patched/`, pictures,
and `reference.json`: P(unsafe) with the picture before the text, and behind it, and the greedy answer to the first.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from demo import CARRIER, REQUESTS
from transformers import AutoModelForImageTextToText, AutoProcessor

from sasa_export import Options, patch
from sasa_export.models.smol_llava import pieces
from sasa_export.prompts.render import render


def main(out: Path) -> None:
    if (out / "reference.json").exists():
        return
    patch(Options(model="smol-llava", out=out / "patched", force=True, verify="files"))
    model = AutoModelForImageTextToText.from_pretrained(out / "patched", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(out / "patched", trust_remote_code=True)
    prompts = []
    for number, request in enumerate(request for requests in REQUESTS.values() for request in requests):
        picture = render(request, seed=7, pieces=pieces(processor.tokenizer))
        picture.save(out / f"{number}.png")
        for name in (None, f"{number}.png"):
            said = {"type": "text", "text": CARRIER if name else request}
            shown = [{"type": "image", "image": picture}] if name else []
            both = [[{"role": "user", "content": content}] for content in ([*shown, said], [said, *shown])]
            options = {"tokenize": True, "return_dict": True, "processor_kwargs": {"return_tensors": "pt"}}
            texts = processor.apply_chat_template(both, add_generation_prompt=True, tokenize=False)
            before, behind = (
                dict(processor.apply_chat_template([chat], add_generation_prompt=True, **options)) for chat in both
            )
            with torch.no_grad():
                answer = model.generate(**before, max_new_tokens=16, do_sample=False)
            found = float(model.judge(**before))
            prompts.append({
                "text": texts[0], "words": said["text"], "picture": name, "ids": before["input_ids"][0].tolist(),
                "probability": found, "behind": float(model.judge(**behind)),
                "refused": found >= model.config.sasa["threshold"],
                "answer": answer[0, before["input_ids"].shape[1] :].tolist(),
            })  # fmt: skip
    (out / "reference.json").write_text(json.dumps(prompts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
