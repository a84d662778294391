"""Tell a client that its request was refused: its answer's finish reason is then "content_filter", an OpenAI one.

The names of refused requests travel beside their tokens: from the worker to the scheduler, which writes a stop reason,
and from there to the frontend, which writes the finish reason. No token passes here: without any of it, a refused
request gets the refusal all the same, which then ends with "stop".
"""

from collections.abc import Callable
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import FinishReason
from vllm.v1.engine.output_processor import RequestState

from sasa_vllm.requests import wrap

FILTERED = "content_filter"


def register() -> None:
    """Let vLLM's scheduler and frontend hand on what `note_refused` leaves."""
    wrap(Scheduler, "update_from_output", mark_refused)
    wrap(RequestState, "_new_completion_output", name_reason)


def note_refused(output: Any, names: set[str]) -> Any:
    """Leave the names of a step's refused requests at its output in the worker."""
    # What is still on its way from a GPU holds all but the tokens inside: by the first name in V1, the second in V2.
    held = getattr(output, "_model_runner_output", None) or getattr(output, "model_runner_output", output)
    held.refused_by_sasa = names
    return output


def mark_refused(update: Callable, scheduler: Any, step: Any, output: Any) -> Any:
    """In the scheduler: the stop reason of refused requests that end with a step."""
    told = update(scheduler, step, output)
    names = getattr(output, "refused_by_sasa", ())
    for one in (one for client in told.values() for one in client.outputs if one.request_id in names):
        if one.finish_reason not in (None, FinishReason.ERROR):
            one.stop_reason = FILTERED
    return told


def name_reason(make: Callable, *args: Any) -> Any:
    """In the frontend: the finish reason of an answer with that stop reason."""
    answer = make(*args)
    if answer.stop_reason == FILTERED:
        answer.finish_reason = FILTERED
    return answer
