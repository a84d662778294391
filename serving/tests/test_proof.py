"""On a vLLM that was read and never run: an engine that proves its gate starts, one whose gate is broken does not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Model, same
from engine import environment

SCRIPT = """
import json, sys
job = json.loads(sys.argv[1])
if job["v2"]:
    import v2_on_cpu  # before vLLM
import vllm
vllm.__version__ = job["version"]
from vllm.plugins import load_general_plugins
from vllm.v1.sample.ops import topk_topp_sampler
topk_topp_sampler.HAS_TRITON = False  # Triton's interpreter cannot run its kernel
load_general_plugins()
from vllm.v1.engine.core import EngineCore
from sasa_vllm import gate, lane, models, worker
import torch
exec(job["broken"])
llm = vllm.LLM(job["model"], dtype="float32", enforce_eager=True, max_model_len=256, block_size=32,
               kv_cache_memory_bytes=1 << 26, **job["options"])
asked = [{"prompt_token_ids": ids} for ids in job["prompts"]]
outputs = [output.outputs[0] for output in llm.generate(asked, vllm.SamplingParams(max_tokens=16, temperature=0.0))]
print("FOUND", json.dumps([[answer.finish_reason, list(answer.token_ids)] for answer in outputs]))
"""
NO_CAP = """
def uncapped(init, scheduler, *args, **kwargs):
    init(scheduler, *args, **kwargs)
    del scheduler.kv_cache_manager.coordinator.find_longest_cache_hit
init = vllm.v1.core.sched.scheduler.Scheduler.__init__
vllm.v1.core.sched.scheduler.Scheduler.__init__ = lambda *args, **kwargs: uncapped(init, *args, **kwargs)
"""
REFUSING_LATE = """
refused = gate.Gate.refused
gate.Gate.refused = lambda self, names: {} if self.counts and max(self.counts.values()) > 1 else refused(self, names)
"""
ANOTHER_LANE = """
forward = models.tap
def other(*args):
    one, *more = forward(*args)
    return one * 1.5, *more
models.tap = other
"""
BROKEN = {
    "no gate at the sampler": "worker.GatedSampler = lambda sampler, gate, runner: sampler",
    "a gate behind the first token": REFUSING_LATE,
    "another refusal": "refused = gate.Gate.refused; gate.Gate.refused = lambda *all: dict.fromkeys(refused(*all), 5)",
    "a gate that refuses all": "lane.Lane.judge = lambda self, tails: torch.full((len(tails),), float('nan'))",
    "no cap on the prefix cache": NO_CAP,
    "another main lane": ANOTHER_LANE,
}


def asked(
    model: Model, broken: str = "", version: str = "0.33.0", v2: bool = False, warned: bool = True, **options: Any
) -> Any:
    """The finish reason and the answer of each prompt without a picture, or, as a text, why no engine started."""
    prompts = [prompt["ids"] for prompt in text_alone(model)]
    job = {"model": str(options.pop("directory", model.directory)), "broken": broken, "version": version, "v2": v2}
    settings = environment(**({"VLLM_USE_V2_MODEL_RUNNER": "1"} if v2 else {}))
    command = [sys.executable, "-c", SCRIPT, json.dumps({**job, "options": options, "prompts": prompts})]
    tests = Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, env=settings, cwd=tests, timeout=1500)
    said = done.stdout + done.stderr
    assert ("has to prove itself" in said) == warned
    return said[-6000:] if done.returncode else json.loads(re.findall("^FOUND (.*)$", said, re.MULTILINE)[0])


def text_alone(model: Model) -> list[dict[str, Any]]:
    return [prompt for prompt in model.prompts if prompt["picture"] is None]


@pytest.mark.parametrize(
    "name, v2", [("llava", False), ("none", False), ("qwen3_vl", False), ("gemma3", False), ("llava", True)]
)
def test_a_gate_that_holds(model: Callable[[str], Model], name: str, v2: bool) -> None:
    guarded = model(name)
    found = asked(guarded, v2=v2)
    assert not isinstance(found, str), found
    for (reason, answer), prompt in zip(found, text_alone(guarded), strict=True):
        assert same(answer, prompt["answer"]) and (reason == "content_filter") == prompt["refused"]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_gate(model: Callable[[str], Model], name: str) -> None:
    assert "the gate of this guarded model does not hold on vLLM 0.33.0" in asked(model("llava"), BROKEN[name])


def test_a_gate_that_observes(model: Callable[[str], Model], tmp_path: Path) -> None:
    """It proves that it could refuse, and then refuses nothing."""
    observing = model("llava").edited(tmp_path, gate="observe")
    found = asked(model("llava"), directory=observing)
    assert all(reason != "content_filter" for reason, _ in found)
    assert "does not hold" in asked(model("llava"), BROKEN["no gate at the sampler"], directory=observing)


def test_without_the_proof_everything_is_refused(model: Callable[[str], Model]) -> None:
    gone = "hook = '_initialize_effective_attention_block_size'\n"
    gone += "setattr(EngineCore, hook, getattr(EngineCore, hook).__wrapped__)"
    guarded = model("llava")
    found = asked(guarded, gone, warned=False)
    assert any(not prompt["refused"] for prompt in text_alone(guarded))
    assert all(answer == guarded.sasa["refusal_token_ids"] for _, answer in found)


def test_on_a_version_that_was_tried_nothing_is_proven(model: Callable[[str], Model]) -> None:
    found = asked(model("llava"), version="0.32.0", warned=False)
    assert {reason for reason, _ in found} == {"content_filter", "length"}
