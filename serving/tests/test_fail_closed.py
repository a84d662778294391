"""What must not start, and what says why."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Model
from engine import environment, serve

SCRIPT = """
import json, sys
job = json.loads(sys.argv[1])
import vllm
if "version" in job:
    vllm.__version__ = job["version"]
from vllm.engine.arg_utils import EngineArgs
found = {}
for name, options in job["options"].items():
    try:
        EngineArgs(job["model"], enforce_eager=True, dtype="float32", **options).create_engine_config()
        found[name] = None
    except Exception as error:
        found[name] = str(error)
print(json.dumps(found))
"""


def configured(directory: Path, options: dict[str, dict[str, Any]], plugins: str | None = None, **job: Any) -> Any:
    """What vLLM says when an engine is set up with each of `options`; None where it would start."""
    settings = environment(**({} if plugins is None else {"VLLM_PLUGINS": plugins}))
    job |= {"model": str(directory), "options": options}
    command = [sys.executable, "-c", SCRIPT, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=settings, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_without_the_package(model: Callable[[str], Model]) -> None:
    """VLLM_PLUGINS without ours is vLLM as if the package were not installed."""
    directory, stock = model("llava").directory, {"architectures": ["LlavaForConditionalGeneration"]}
    found = configured(directory, {"": {}}, plugins="others")
    assert "sasa_llava" in found[""] or "trust_remote_code" in found[""]
    for options in ({}, {"model_impl": "transformers"}, {"hf_overrides": stock}):
        assert started(directory, {"trust_remote_code": True, **options}, plugins="others") != 0


def started(directory: Path, options: dict[str, Any], before: str = "", plugins: str | None = None) -> Any:
    """0 where an engine starts and answers; else the end of what it said."""
    script = f"""
import json, sys
from vllm import LLM, SamplingParams
from vllm.plugins import load_general_plugins
load_general_plugins()
{before}
llm = LLM({str(directory)!r}, dtype="float32", enforce_eager=True, max_model_len=256, kv_cache_memory_bytes=1 << 26,
          **json.loads(sys.argv[1]))
llm.generate(["hello"], SamplingParams(max_tokens=2))
"""
    settings = environment(**({} if plugins is None else {"VLLM_PLUGINS": plugins}))
    command = [sys.executable, "-c", script, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, env=settings, timeout=900)
    return 0 if done.returncode == 0 else done.stderr[-6000:]


def test_half_of_the_package(model: Callable[[str], Model]) -> None:
    directory = model("llava").directory
    assert started(directory, {}) == 0
    unset = "from vllm.model_executor.models import config; config.MODELS_CONFIG_MAP.clear()"
    assert "sasa_vllm.worker.GuardedWorker alone" in started(directory, {}, unset)
    stock = {"hf_overrides": {"architectures": ["LlavaForConditionalGeneration"]}}
    assert "sasa" in started(directory, stock)


def test_another_version(model: Callable[[str], Model]) -> None:
    found = configured(model("llava").directory, {"": {}}, version="0.99.0")
    assert all(version in found[""] for version in ("0.99.0", "0.32.0", "0.34.0"))


OPTIONS: dict[str, dict[str, Any]] = {
    "--speculative-config": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
    "--pipeline-parallel-size": {"pipeline_parallel_size": 2},
    "--enable-lora": {"enable_lora": True},
    "--enable-prompt-embeds": {"enable_prompt_embeds": True},
    "--runner pooling": {"runner": "pooling"},
    "--load-format dummy": {"load_format": "dummy"},
    "--worker-cls": {"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"},
    "--kv-transfer-config": {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
    "--logits-processors": {"logits_processors": ["somebody:Processor"]},
    "--enable-trace-replay": {"enable_trace_replay": True},
    "--watermark-config": {"watermark_config": {"key": 1}},
    "--diffusion-config": {"diffusion_config": {"canvas_length": 8}},
    "--enable-batch-sharded-sampling": {"enable_batch_sharded_sampling": True, "tensor_parallel_size": 2},
}


def test_options(model: Callable[[str], Model]) -> None:
    """Each is named in an error before the engine starts; without any, it starts."""
    found = configured(model("llava").directory, {**OPTIONS, "none": {}, "two": {"tensor_parallel_size": 2}})
    assert found.pop("none") is None and found.pop("two") is None
    for option, said in found.items():
        assert said and option in said, (option, said)


def projection(sasa: dict[str, Any]) -> dict[str, Any]:
    return next(node for node in sasa["graph"] if node["op"] == "projection")


@pytest.mark.parametrize(
    "edit, said",
    [
        (lambda sasa: sasa.update(gate="off"), "the gate 'off'"),
        (lambda sasa: sasa.update(begun_answers="now"), "the begun_answers 'now'"),
        (lambda sasa: sasa.update(format=99), "format"),
        (lambda sasa: sasa.pop("graph"), "no complete"),
        (lambda sasa: sasa.update(threshold=2.0), "threshold"),
        (lambda sasa: projection(sasa).pop("tokens"), "--lane-tokens 8"),
        (lambda sasa: projection(sasa).update(tokens=0), "--lane-tokens 8"),
    ],
)
def test_settings(model: Callable[[str], Model], tmp_path: Path, edit: Callable[[Any], Any], said: str) -> None:
    config = json.loads((model("llava").directory / "config.json").read_text())
    for path in model("llava").directory.iterdir():
        (tmp_path / path.name).symlink_to(path)
    edit(config["sasa"])
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert said in configured(tmp_path, {"": {}})[""]


def test_a_lane_into_pictures_that_are_read_both_ways(model: Callable[[str], Model], tmp_path: Path) -> None:
    for tokens, said in (8, None), (9, "--lane-tokens 8"):
        graph = model("gemma3").sasa["graph"]
        projection({"graph": graph})["tokens"] = tokens
        found = configured(model("gemma3").edited(tmp_path / str(tokens), graph=graph), {"": {}})[""]
        assert found is None if said is None else said in found


@pytest.mark.parametrize("value", ["nan", "0"])
def test_probe(model: Callable[[str], Model], tmp_path: Path, value: str) -> None:
    import torch
    from safetensors.torch import save_file

    for path in model("llava").directory.iterdir():
        (tmp_path / path.name).symlink_to(path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.unlink()
    save_file({"sasa.probe.weight": torch.full((64,), float(value)), "sasa.probe.bias": torch.tensor(0.0)}, shard)
    assert "sasa.probe is missing, zero, NaN" in started(tmp_path, {})


def test_refused_without_a_word_of_it(model: Callable[[str], Model]) -> None:
    """What tells the client that it was refused may be missing in vLLM: then the refusal ends as any answer."""
    guarded = model("llava")
    gone = """
from sasa_vllm import answers
for owner, name in (answers.Scheduler, "update_from_output"), (answers.RequestState, "_new_completion_output"):
    setattr(owner, name, getattr(owner, name).__wrapped__)
"""
    (found,), _ = serve(guarded.directory, guarded.some(refused=True), before=gone)
    assert {outcome["reasons"][0] for outcome in found} == {"stop"}
    assert {tuple(outcome["answers"][0]) for outcome in found} == {tuple(guarded.sasa["refusal_token_ids"])}
