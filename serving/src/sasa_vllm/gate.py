"""Judges each request, and puts the refusal in place of a refused answer."""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed import get_tp_group
from vllm.logger import init_logger

from sasa_vllm.config import ONLY_READ
from sasa_vllm.formulas import gate
from sasa_vllm.lane import Lane, Tail
from sasa_vllm.metrics import Metrics
from sasa_vllm.requests import begins_answer

logger = init_logger("vllm.sasa")


@dataclass
class Request:
    """The gate's record of one request."""

    prompt: int  # tokens
    seen: int = 0  # tokens, at the end of the current step
    refused: bool | None = None  # None before the verdict
    tail: Tail | None = None  # the lane's input, as far as it was computed


class Gate:
    """The gate of one worker. The scheduler tells it what a step runs. The lane, or without one the model, gives it
    P(unsafe). The sampler asks it for the refused rows.

    A verdict is due where a step ends with a request's prompt. It holds until the request is finished, also over
    preemption.
    """

    def __init__(self, sasa: dict[str, Any], metrics: Metrics) -> None:
        self.sasa, self.metrics = sasa, metrics
        self.enforcing = sasa.get("gate") != "observe"
        if not self.enforcing:
            logger.warning("the gate of this model only observes: prompts are judged, and none is refused.")
        self.stage = "refuse" if ONLY_READ else None  # of the proof (proof.py), or None where the gate serves
        self.requests: dict[str, Request] = {}
        self.said: set[str] = set()  # requests that got a token of the refusal in the last step
        self.lane: Lane | None = None
        self.counts: dict[str, int] = {}  # request -> its tokens in the current step
        self.probability: torch.Tensor | None = None  # (rows,), of the current step

    def schedule(self, step: Any) -> None:
        """Update the records from a step, vLLM's SchedulerOutput."""
        for name in step.finished_req_ids:
            self.requests.pop(name, None)
        going_on = step.scheduled_cached_reqs
        computed = dict(zip(going_on.req_ids, going_on.num_computed_tokens, strict=True))
        for new in step.scheduled_new_reqs:
            computed[new.req_id] = new.num_computed_tokens
            known = self.requests.get(new.req_id)
            if known is None or known.prompt != new.prompt_len:  # else it returns from preemption with its verdict
                self.requests[new.req_id] = self._first_seen(new)
        self.counts = step.num_scheduled_tokens
        for name, count in self.counts.items():
            self.requests[name].seen = computed[name] + count

    def _first_seen(self, new: Any) -> Request:
        # The frontend rejects these (requests.py). Here they lose prompt_logprobs, and unfit prompts are refused.
        new.sampling_params.prompt_logprobs = new.sampling_params.prompt_logprob_token_ids = None
        unfit = new.prompt_token_ids is None or begins_answer(self.sasa, new.prompt_token_ids)
        return Request(new.prompt_len, refused=True if unfit else None)

    def follow(self, ends: torch.Tensor, names: list[str], positions: torch.Tensor) -> None:
        """Keep the last tokens of each prompt, and run the lane over them where it ends. `ends` (tokens, 4 * hidden) is
        the decoder's output for the requests `names`, in this order, at positions (tokens,) or (axes, tokens)."""
        if self.lane is None:
            return
        states, begin, whole = ends[:, ends.shape[-1] // 4 :], 0, {}  # (tokens, 3 * hidden)
        for row, name in enumerate(names):
            known, count = self.requests[name], self.counts[name]
            if known.refused is None and known.seen - count < known.prompt:
                step = slice(begin, begin + count)
                known.tail = self.lane.follow(known.tail, states[step], positions[..., step], known.seen)
                if self.lane.is_whole(known.tail, known.prompt):
                    whole[row] = known.tail
            begin += count
        # NaN: a prompt that ends without all of its last tokens cannot be judged.
        self.probability = torch.full((len(names),), float("nan"), device=ends.device)  # (rows,)
        if whole:
            self.probability[list(whole)] = self.lane.judge(list(whole.values()))

    def refused(self, names: list[str]) -> dict[int, int]:
        """Return the refused rows among the requests `names`, and the refusal's next token for each. Return none if the
        gate observes. Raise RuntimeError if a verdict is due without P(unsafe)."""
        probability, self.probability = self.probability, None
        rows = [self.requests.get(name) for name in names]
        due = [row for row, known in enumerate(rows) if known and known.refused is None and known.seen == known.prompt]
        if due:
            if probability is None or len(probability) != len(names):
                raise RuntimeError("the gate did not see P(unsafe) of the tokens that are sampled, so nothing is.")
            # All workers take the first one's value, since rounding may differ between them.
            probability = get_tp_group().broadcast(probability.contiguous(), src=0)
            for row, value in zip(due, probability[due].tolist(), strict=True):
                self._judge(names[row], rows[row], value)
        tokens = self.sasa["refusal_token_ids"]
        wanted = {}
        for row, known in enumerate(rows):
            said = 0 if known is None else known.seen - known.prompt  # tokens of the answer, below 0 within the prompt
            if known is None or known.refused or (known.refused is None and said >= 0):
                wanted[row] = tokens[min(max(said, 0), len(tokens) - 1)]
        wanted = wanted if self.enforcing or self.stage else {}
        self.said = {names[row] for row in wanted}
        return wanted

    def _judge(self, name: str, request: Any, probability: float) -> None:
        threshold = {None: self.sasa["threshold"], "refuse": 0.0}.get(self.stage, 2.0)
        request.refused, request.tail = not probability < threshold, None  # NaN is refused
        if self.stage is None:
            self.metrics.count(probability, request.refused, enforced=self.enforcing)
        verdict = "allowed" if not request.refused else "refused" if self.enforcing else "would be refused"
        logger.debug("%s %s: P(unsafe) = %.6f, threshold %.4f", verdict, name, probability, self.sasa["threshold"])


class GatedSampler:
    """The runner's sampler between two steps of the gate. Before it, forced logits keep logprobs from showing the
    withheld answer. Behind it, the refusal's token overrides all that a request may set."""

    def __init__(self, sampler: Any, gate: Gate, runner: Any) -> None:
        self.sampler, self.gate, self.runner = sampler, gate, runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)

    def __call__(self, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Model Runner V2 passes its batch; V1 keeps one, which is empty in runs on made-up inputs.
        batch = args[0] if args and hasattr(args[0], "req_ids") else self.runner.input_batch
        wanted = {} if self.gate.stage == "aside" else self.gate.refused(batch.req_ids)
        if not wanted:
            return self.sampler(logits, *args, **kwargs)
        output = self.sampler(self.forced(logits, wanted), *args, **kwargs)
        rows = torch.tensor(list(wanted), device=logits.device)  # (refused,)
        tokens = torch.tensor(list(wanted.values()), device=logits.device)  # (refused,)
        output.sampled_token_ids[rows, 0] = tokens.to(output.sampled_token_ids.dtype)
        told = output.logprobs_tensors
        if told is not None and told.logprob_token_ids.numel():
            told.logprob_token_ids[rows, 0] = tokens.to(told.logprob_token_ids.dtype)
        return output

    def forced(self, logits: torch.Tensor, wanted: dict[int, int]) -> torch.Tensor:
        """Return the logits (rows, vocabulary), with rows in `wanted` forced to its tokens."""
        places = [[wanted.get(row, 0)] for row in range(len(logits))]
        refused = [[row in wanted] for row in range(len(logits))]
        token, mask = (torch.tensor(values, device=logits.device) for values in (places, refused))  # (rows, 1)
        return gate(logits[:, None], token, mask, tuple(self.gate.sasa["refusal_token_ids"]))[:, 0]
