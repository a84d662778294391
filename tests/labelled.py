"""Labelled prompts whose labels their words tell, and what one process and two do alike on them.

Usage of the script: MODEL EVALUATION CALIBRATION OUT, as a process of `torch.distributed.run`.
"""

import json
import random
import sys
from pathlib import Path

import tiny

SAFETY, SEMANTIC = 2, 4
WORDS = {0: ("cake", "rice", "apples", "river"), 1: ("broken", "fire", "knife", "old")}


def write_set(folder: Path, name: str, seed: int, groups: int) -> Path:
    """A JSONL file of pairs, every third with pictures."""
    draw = random.Random(seed)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for group in range(groups):
        for label in (0, 1):
            image = None
            if group % 3 == 0:
                image = f"pictures/{name}-{group}-{label}.png"
                tiny.random_image(1000 * seed + 2 * group + label).save(folder / image)
            asked = f"{name} {group} " + " ".join(draw.choices(WORDS[label], k=6))
            entry = {"image": image, "prompt": asked, "label": label, "group": f"pair {group}"}
            lines.append({**entry, "category": ("kitchen", "street")[group % 2], "id": f"{name}-{group}-{label}"})
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def patch_evaluate_locate(model: str, evaluation: str, calibration: str, out: Path) -> None:
    """All that processes can share."""
    import sasa_export
    from sasa_export.report import Console
    from sasa_export.research.evaluate.run import evaluate
    from sasa_export.research.locate.run import locate
    from sasa_export.research.options import EvaluateOptions, LocateOptions

    sasa_export.patch(
        sasa_export.Options(
            model=model, out=out / "patched", calibration=(calibration,), max_false_positive_rate=0.2, verify="files",
            safety_layer=SAFETY, semantic_layer=SEMANTIC, batch_size=8,
        )
    )  # fmt: skip
    evaluate(
        EvaluateOptions(model=out / "patched", out=out / "report", data=(evaluation,), max_new_tokens=8, batch_size=8)
    )
    locate(
        LocateOptions(
            model=model, out=out / "located", calibration=(calibration,), pairs="1:3,2:4", batch_size=8
        ),
        Console(),
    )  # fmt: skip


if __name__ == "__main__":
    patch_evaluate_locate(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
