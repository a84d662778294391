"""Serve models that sasa-export patched on vLLM, with their gate. docs/serving.md says how it works."""


def register() -> None:
    """Called by vLLM in each of its processes; whatever serves other models stays as it was."""
    from vllm.v1.engine.core import EngineCore

    from sasa_vllm import answers, config, proof, requests

    config.register()
    requests.register()
    answers.register()
    if config.ONLY_READ:
        requests.wrap(EngineCore, "_initialize_effective_attention_block_size", proof.prove)
