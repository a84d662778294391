"""Counts of judged and refused prompts, and the distribution of P(unsafe), on vLLM's own /metrics.

Workers give the verdicts, but another process answers /metrics. prometheus_client shares numbers through files: each
process writes its own into one directory, and a collector adds them up.
"""

import os
import tempfile

from prometheus_client import REGISTRY, Counter, Histogram, values
from prometheus_client.multiprocess import MultiProcessCollector

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"  # where vLLM's own multi-process metrics lie, if it has several API servers
OURS = "SASA_VLLM_METRICS"  # "<process id of the frontend>:<directory>"


def collect() -> None:
    """Make /metrics include the workers' numbers. The frontend calls this before any worker starts."""
    if OURS in os.environ:
        return
    directory = os.environ.get(DIRECTORY)
    if directory is None:  # the registry of this process then answers /metrics
        directory = tempfile.mkdtemp(prefix="sasa-vllm-")
        REGISTRY.register(MultiProcessCollector(None, path=directory))
    os.environ[OURS] = f"{os.getpid()}:{directory}"


class Metrics:
    """The metrics of one worker. Several workers judge the same prompts, but only one is `reporting`."""

    def __init__(self, *, reporting: bool) -> None:
        self.reporting = reporting
        if not reporting:
            return
        frontend, _, directory = os.environ.get(OURS, "").partition(":")
        if directory and frontend != str(os.getpid()):
            os.environ.setdefault(DIRECTORY, directory)
            values.ValueClass = values.MultiProcessValue()
        self.judged = Counter("sasa:prompts_judged", "Prompts that were judged.")
        self.refused = Counter("sasa:prompts_refused", "Prompts that were refused.")
        self.spared = Counter("sasa:prompts_would_be_refused", "Prompts that a gate that observes let pass.")
        steps = [step / 20 for step in range(1, 21)]
        self.spread = Histogram("sasa:unsafe_probability", "P(unsafe) of the prompts that were judged.", buckets=steps)

    def count(self, probability: float, refused: bool, *, enforced: bool) -> None:
        if self.reporting:
            self.judged.inc()
            (self.refused if enforced else self.spared).inc(refused)
            self.spread.observe(probability)
