"""One vLLM engine in a process of its own: python engine.py JOB.json OUT.json.

The job names a model, options of the engine, and batches of prompts, which run one after another. What is written holds
a list of outcomes for each batch. `serve` runs it and adds the verdicts, which the gate tells in its log.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ENGINE = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 512, "block_size": 32, "max_num_seqs": 16,
    "kv_cache_memory_bytes": 1 << 28, "disable_log_stats": False,
}  # fmt: skip
VERDICT = re.compile(r"(refused|allowed) (\S+): P\(unsafe\) = (\S+),")


def serve(
    model: Path, *batches: list[dict[str, Any]], before: str = "", v2: bool = False, **options: Any
) -> tuple[list[Any], dict[str, float]]:
    """The outcomes of batches of prompts, each with its `probability`; and the engine's counters.

    Args: before: Python code that runs before the engine is made, with sasa-vllm registered; v2: by Model Runner V2,
    which vLLM picks on GPUs.
    """
    with tempfile.TemporaryDirectory() as scratch:
        job, out = Path(scratch, "job.json"), Path(scratch, "out.json")
        job.write_text(json.dumps({"model": str(model), "batches": batches, "before": before, "options": options}))
        settings = environment(**({"VLLM_USE_V2_MODEL_RUNNER": "1"} if v2 else {}))
        command = [sys.executable, __file__, job, out]
        done = subprocess.run(command, capture_output=True, text=True, env=settings, timeout=1500)
        assert out.exists(), done.stdout[-3000:] + done.stderr[-3000:]
        assert ("Using V2 Model Runner" in done.stdout + done.stderr) == v2
        found = json.loads(out.read_text())
    verdicts: dict[str, list[float]] = {}
    for _, name, probability in VERDICT.findall(done.stdout + done.stderr):
        verdicts.setdefault(re.sub(r"-\w{8}$", "", name).split("_")[-1], []).append(float(probability))
    for outcome in (outcome for batch in found["batches"] for outcome in batch):
        outcome["probabilities"] = verdicts.get(outcome["id"], [])
        outcome["probability"] = outcome["probabilities"][0] if outcome["probabilities"] else None
    return found["batches"], found["counters"]


def environment(**more: str) -> dict[str, str]:
    single = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_NO_USAGE_STATS": "1"}
    own["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # others may use the machine too
    return {**os.environ, **single, **own, **more}


def main(job: dict[str, Any]) -> dict[str, Any]:
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        import v2_on_cpu  # noqa: F401
    from vllm import LLM
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    exec(job["before"], {})
    llm = LLM(job["model"], **{**ENGINE, **job["options"]})
    batches: list[list[dict[str, Any]]] = []
    for batch in job["batches"]:
        for prompt in batch:
            if earlier := prompt.get("after"):  # of another batch, whose answer this goes on behind
                number, place = earlier
                said = batches[number][place]["answers"][0]
                prompt["ids"] = [*job["batches"][number][place]["ids"], *said, *prompt["ids"]]
        batches.append(run(llm, Path(job["model"]).parent, batch))
    counters = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return {"batches": batches, "counters": counters}


def run(llm: Any, folder: Path, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A batch at once; its requests are aborted after as many steps as `abort` says, where a prompt says so."""
    from vllm.exceptions import VLLMValidationError

    engine = llm.llm_engine
    numbers = [str(next(llm.request_counter)) for _ in batch]
    outcomes = {number: {"id": number, "answers": [], "error": None} for number in numbers}
    for number, prompt in zip(numbers, batch, strict=True):
        try:
            engine.add_request(number, inputs(folder, prompt), parameters(prompt))
        except (ValueError, VLLMValidationError) as error:
            outcomes[number]["error"] = str(error)
    steps = 0
    while engine.has_unfinished_requests():
        steps += 1
        for number, prompt in zip(numbers, batch, strict=True):
            if prompt.get("abort") == steps:
                engine.abort_request([number])
        for output in engine.step():
            outcomes[output.request_id].update(told(output))
    return list(outcomes.values())


def inputs(folder: Path, prompt: dict[str, Any]) -> dict[str, Any]:
    from PIL import Image

    if not prompt["picture"]:
        return {"prompt_token_ids": prompt["ids"]}
    if isinstance(prompt["picture"], str):
        return {"prompt": prompt["text"], "multi_modal_data": {"image": Image.open(folder / prompt["picture"])}}
    pictures = [Image.open(folder / picture) for picture in prompt["picture"]]
    return {"prompt_token_ids": prompt["ids"], "multi_modal_data": {"image": pictures}}


def parameters(prompt: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    given = {"temperature": 0.0, "max_tokens": 16, **prompt.get("params", {})}
    if "structured_outputs" in given:
        given["structured_outputs"] = StructuredOutputsParams(**given["structured_outputs"])
    if "logit_bias" in given:  # JSON made texts of its keys
        given["logit_bias"] = {int(token): value for token, value in given["logit_bias"].items()}
    return SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **given)


def told(output: Any) -> dict[str, Any]:
    answers = [list(answer.token_ids) for answer in output.outputs]
    candidates = [[sorted(place) for place in answer.logprobs or []] for answer in output.outputs]
    reasons = [answer.finish_reason for answer in output.outputs]
    return {"ids": output.prompt_token_ids, "answers": answers, "candidates": candidates, "reasons": reasons}


if __name__ == "__main__":
    found = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(found))
