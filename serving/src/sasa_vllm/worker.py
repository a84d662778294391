"""vLLM's worker for this platform, with the gate around its sampler."""

from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.platforms import current_platform

from sasa_vllm.answers import note_refused
from sasa_vllm.gate import Gate, GatedSampler
from sasa_vllm.metrics import Metrics

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
elif current_platform.is_cuda_alike():
    from vllm.v1.worker.gpu_worker import Worker
else:
    raise ImportError(f"{current_platform.device_name}: sasa-vllm guards models on CPUs and on CUDA or ROCm GPUs.")


class GuardedWorker(Worker):
    """The worker that `sasa_vllm.config` picks for guarded models. It runs Model Runner V1 or V2, as vLLM picks.

    V2 alone notes the batch in its state; vLLM 0.34 has no other.
    """

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        runner = self.model_runner
        model = runner.get_model()
        self.gate = Gate(model.sasa, Metrics(reporting=False))
        with set_current_vllm_config(self.vllm_config):
            model.guard(self.gate)
        runner.sampler = GatedSampler(runner.sampler, self.gate, runner)

    def compile_or_warm_up_model(self) -> Any:
        done = super().compile_or_warm_up_model()
        self.gate.metrics = Metrics(reporting=self.rank == 0)  # only now, since V2 warms up with made-up requests
        return done

    def execute_model(self, scheduler_output: Any) -> Any:
        self.gate.schedule(scheduler_output)
        return super().execute_model(scheduler_output)

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        runner, state = self.model_runner, self.model_runner.execute_model_state
        if state is None:  # nothing was computed
            return super().sample_tokens(grammar_output)
        count = len(state.hidden_states)
        if hasattr(state, "input_batch"):  # V2
            batch, axes = state.input_batch, runner.model_state.rope_state
            positions = axes.get_positions(count) if axes else batch.positions  # (axes, tokens) or (tokens,)
        else:
            batch, positions = runner.input_batch, runner._get_positions(count)
        self.gate.follow(state.hidden_states, batch.req_ids, positions)
        return note_refused(super().sample_tokens(grammar_output), self.gate.said)
