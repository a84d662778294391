"""Serve models that sasa-export patched on vLLM, with their gate.

| file | what it does |
|---|---|
| `formulas.py`, `settings.py` | those of sasa_export/runtime, which the build puts here |
| `config.py` | opens a patched config.json, and sets the engine up so that the gate can guard it, or refuses to |
| `models.py` | extends vLLM's class of each family by the projection |
| `lane.py` | the second lane, over the last tokens of prompts |
| `gate.py` | the verdict of each request, and the refusal in place of its answer |
| `worker.py` | puts the gate around the sampler, behind everything that a request may set |
| `requests.py` | refuses requests that could only be answered wrongly, with an error that says why |
| `answers.py` | tells a client that its request was refused |
| `metrics.py` | counters and a histogram on vLLM's own /metrics |
"""


def register() -> None:
    """Called by vLLM in each of its processes; whatever serves other models stays as it was."""
    from sasa_vllm import answers, config, requests

    config.register()
    requests.register()
    answers.register()
