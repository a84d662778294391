"""vLLM's worker for the platform, with the gate around its sampler."""

from typing import Any

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
    """`sasa_vllm.config` picks it for guarded models."""

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        runner = self.model_runner
        model = runner.get_model()
        self.gate = Gate(model.sasa, Metrics(reporting=self.rank == 0))
        with set_current_vllm_config(self.vllm_config):
            model.guard(self.gate)
        runner.sampler = GatedSampler(runner.sampler, self.gate, runner)

    def execute_model(self, scheduler_output: Any) -> Any:
        self.gate.schedule(scheduler_output)
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        return note_refused(super().sample_tokens(grammar_output), self.gate.said)
