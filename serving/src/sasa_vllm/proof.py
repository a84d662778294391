"""Makes an engine prove its gate before it serves, on vLLM versions whose source was read but which never ran."""

from collections.abc import Callable
from typing import Any

import vllm
from vllm.logger import init_logger
from vllm.v1.request import Request

STAGES = ("aside", "allow", "refuse")  # of the gate: it does nothing, allows everything, refuses everything


def prove(initialize: Callable, engine: Any) -> None:
    """Ask a made-up prompt at each stage of the gate, through the engine's own scheduler and workers.

    This runs once the engine has both; until then its gate refuses everything. Raise RuntimeError unless a refused
    prompt gets the whole refusal, and an allowed one the same tokens as with the gate aside.
    """
    initialize(engine)
    sasa = getattr(engine.vllm_config.model_config.hf_config, "sasa", None)
    if sasa is None:
        return
    init_logger("vllm.sasa").warning(
        "sasa-vllm never ran on vLLM %s, whose source was read: the gate has to prove itself.", vllm.__version__
    )
    said = {}
    for stage in STAGES:
        set_stage(engine, stage)
        said[stage] = answer(engine, f"sasa {stage}", sasa)
    if said["refuse"] != sasa["refusal_token_ids"] or said["allow"] != said["aside"]:
        raise RuntimeError(
            f"the gate of this guarded model does not hold on vLLM {vllm.__version__}: {said}. Install a version that "
            "docs/serving.md says was run."
        )
    set_stage(engine, None)


def set_stage(engine: Any, stage: str | None) -> None:
    """Set the gate's stage in each worker. None means that the gate serves."""
    engine.model_executor.collective_rpc(lambda worker: setattr(worker.gate, "stage", stage))


def answer(engine: Any, name: str, sasa: dict[str, Any]) -> list[int]:
    """Return the greedy answer to the made-up prompt, as many tokens as the refusal has."""
    scheduler, executor, length = engine.scheduler, engine.model_executor, engine.vllm_config.model_config.max_model_len
    refusal, opening, size = sasa["refusal_token_ids"], sasa["generation_prompt_ids"], scheduler.hash_block_size
    # The prompt ends one token behind a cache block. The prefix cache must not skip that block, which the lane reads.
    words = max(0, min(1 + -len(opening) % size, length - len(opening) - len(refusal)))
    params = vllm.SamplingParams(temperature=0.0, max_tokens=len(refusal))
    request = Request(name, [*(refusal[:-1] * size)[:words], *opening], params, None)
    request.block_hashes = [b"sasa %d" % block for block in range(length // size + 1)]
    scheduler.add_request(request)
    said = []
    while scheduler.has_requests():
        step = scheduler.schedule()
        outputs = scheduler.update_from_output(step, executor.execute_model(step) or executor.sample_tokens(None))
        said += [token for client in outputs.values() for one in client.outputs for token in one.new_token_ids]
    return said
