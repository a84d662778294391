"""Reports a refusal to the client: the answer's finish reason becomes "content_filter", as in OpenAI's API.

The worker passes the names of refused requests, beside their tokens, to the scheduler, which writes a stop reason.
From that, the frontend writes the finish reason. This changes no tokens: without it, a refused request still gets the
refusal, with the finish reason "stop".
"""

from collections.abc import Callable
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import FinishReason
from vllm.v1.engine.output_processor import RequestState

from sasa_vllm.requests import wrap

FILTERED = "content_filter"


def register() -> None:
    """Make vLLM's scheduler and frontend pass on the names that `note_refused` attaches."""
    wrap(Scheduler, "update_from_output", mark_refused)
    wrap(RequestState, "_new_completion_output", name_reason)


def note_refused(output: Any, names: set[str]) -> Any:
    """Attach the names of a step's refused requests to the worker's output, and return the output."""
    # Output still on its way from a GPU wraps the final output, by the first name in Model Runner V1, the second in V2.
    held = getattr(output, "_model_runner_output", None) or getattr(output, "model_runner_output", output)
    held.refused_by_sasa = names
    return output


def mark_refused(update: Callable, scheduler: Any, step: Any, output: Any) -> Any:
    """Write the stop reason of refused requests that end with this step. This runs in the scheduler."""
    told = update(scheduler, step, output)
    names = getattr(output, "refused_by_sasa", ())
    for one in (one for client in told.values() for one in client.outputs if one.request_id in names):
        if one.finish_reason not in (None, FinishReason.ERROR):
            one.stop_reason = FILTERED
    return told


def name_reason(make: Callable, *args: Any) -> Any:
    """Write the finish reason of an answer with that stop reason. This runs in the frontend."""
    answer = make(*args)
    if answer.stop_reason == FILTERED:
        answer.finish_reason = FILTERED
    return answer
