"""Serves sasa-export's patched models on vLLM, with their gate. docs/serving.md says how it works."""


def register() -> None:
    """Install the gate's hooks. vLLM calls this in each of its processes; other models are served unchanged."""
    from vllm.v1.engine.core import EngineCore

    from sasa_vllm import answers, config, proof, requests

    config.register()
    requests.register()
    answers.register()
    if config.ONLY_READ:
        requests.wrap(EngineCore, "_initialize_effective_attention_block_size", proof.prove)
