"""Requests that could only be answered wrongly are refused with an error that says why."""

import functools
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor


def register() -> None:
    """Check what vLLM's frontend makes of each request of a guarded model."""
    process = InputProcessor.process_inputs
    if hasattr(process, "checked_by_sasa"):
        return

    @functools.wraps(process)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process(self, *args, **kwargs)
        sasa = getattr(self.model_config.hf_config, "sasa", None)
        if sasa is not None:
            check_request(sasa, request)
        return request

    process_inputs.checked_by_sasa = True
    InputProcessor.process_inputs = process_inputs


def check_request(sasa: dict[str, Any], request: Any) -> None:
    """Raise VLLMValidationError, which a server answers with status 400."""
    params, reason = request.sampling_params, None
    if request.prompt_token_ids is None or request.prompt_embeds is not None:
        reason = "a prompt of embeddings cannot be judged. Send text or token ids"
    elif params is None:
        reason = "this guarded model generates text and nothing else. Send sampling parameters"
    elif params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None:
        reason = (
            "prompt_logprobs (and echo with logprobs) tell what the model would answer before it is judged. Send none"
        )
    elif begins_answer(sasa, request.prompt_token_ids):
        reason = (
            "the prompt begins the answer (continue_final_message, or beam search), and the verdict is due before "
            "that. End the prompt with the generation prompt"
        )
    if reason is not None:
        raise VLLMValidationError(f"guarded by SASA: {reason}.")


def begins_answer(sasa: dict[str, Any], prompt: list[int]) -> bool:
    """Whether a prompt goes on behind its last generation prompt without a token that ends a turn."""
    opening, turns = sasa["generation_prompt_ids"], set(sasa["turn_token_ids"])
    for end in range(len(prompt), 0, -1):
        if opening and prompt[max(0, end - len(opening)) : end] == opening:
            return end < len(prompt)
        if prompt[end - 1] in turns:
            return False
    return False
