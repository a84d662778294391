"""Rejects requests that the gate cannot guard, with an error that says why."""

import functools
from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor


def register() -> None:
    """Check each request of a guarded model after vLLM's frontend has processed it."""
    wrap(InputProcessor, "process_inputs", process_inputs)


def process_inputs(process: Callable, processor: Any, *args: Any, **kwargs: Any) -> Any:
    request = process(processor, *args, **kwargs)
    sasa = getattr(processor.model_config.hf_config, "sasa", None)
    if sasa is not None:
        check_request(sasa, request)
    return request


def wrap(owner: Any, name: str, around: Callable) -> None:
    """Replace a method by `around(method, self, ...)`. A second call for the same method does nothing."""
    method = getattr(owner, name)
    if not hasattr(method, "wrapped_by_sasa"):
        wrapped = functools.wraps(method)(lambda *args, **kwargs: around(method, *args, **kwargs))
        wrapped.wrapped_by_sasa = True
        setattr(owner, name, wrapped)


def check_request(sasa: dict[str, Any], request: Any) -> None:
    """Raise VLLMValidationError for a request that the gate cannot judge. A server answers with status 400."""
    params, reason = request.sampling_params, None
    if request.prompt_token_ids is None or request.prompt_embeds is not None:
        reason = "a prompt of embeddings cannot be judged. Send text or token ids"
    elif params is None:
        reason = "this guarded model generates text and nothing else. Send sampling parameters"
    elif params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None:
        reason = "prompt_logprobs (and echo with logprobs) tell of an answer before it is judged. Send none"
    elif begins_answer(sasa, request.prompt_token_ids):
        reason = (
            "the prompt begins the answer, or leaves a turn open (continue_final_message, or beam search), and the "
            "verdict is due before that. End the prompt with the generation prompt"
        )
    if reason is not None:
        raise VLLMValidationError(f"guarded by SASA: {reason}.")


def begins_answer(sasa: dict[str, Any], prompt: list[int]) -> bool:
    """Return whether a prompt begins the answer or leaves a turn open. It begins the answer where tokens, but none that
    ends a turn, follow its last generation prompt. An open turn starts with a generation prompt's first token."""
    opening, turns = sasa["generation_prompt_ids"], set(sasa["turn_token_ids"])
    openings = [ids for ids in (opening, *sasa.get("other_generation_prompt_ids", ())) if ids]
    for end in range(len(prompt), 0, -1):
        if any(prompt[max(0, end - len(ids)) : end] == ids for ids in openings):
            return end < len(prompt)
        if prompt[end - 1] in turns:
            return opening[:1] == [prompt[end - 1]]
    return False
