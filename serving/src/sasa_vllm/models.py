"""Guarded versions of vLLM's own classes. Their decoders return the projection beside the main lane."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from vllm import ModelRegistry
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.logger import init_logger
from vllm.platforms import current_platform

from sasa_vllm.config import FAMILIES, GENERATES, WORKER, check_engine, check_version, lane_tokens
from sasa_vllm.formulas import project, unsafe_probability
from sasa_vllm.lane import Lane
from sasa_vllm.settings import HOW_TO_LOAD, check_settings, follow_refusal

logger = init_logger("vllm.sasa")

# vLLM decoders whose forward is the loop over blocks that `GuardedDecoder.forward` writes out.
DECODERS = (
    "llama.LlamaModel", "mistral.MistralModel", "qwen2.Qwen2Model", "qwen3_vl.Qwen3LLMModel", "gemma3.Gemma3Model",
    "glm4.Glm4Model",
)  # fmt: skip


class GuardedModel:
    """Mixin for a family's class: it loads the probe, and answers only with a gate."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        check_version()
        if vllm_config.parallel_config.worker_cls != WORKER:
            raise RuntimeError(f"this guarded model runs in {WORKER} alone, which `vllm serve` picks by itself.")
        check_engine(vllm_config)
        warn_of_causal_pictures(vllm_config)
        config = vllm_config.model_config.hf_config
        check_settings(getattr(config, "sasa", None))
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        follow_refusal(config, vllm_config.model_config.model)
        self.sasa = config.sasa
        self.probe: tuple[Tensor, ...] | None = None  # weight (features,) and bias (), float32
        self.gate: Any = None

    def guard(self, gate: Any) -> None:
        """Attach a gate, and give it the lane. The worker calls this when all weights are loaded."""
        if self.probe is None:
            raise RuntimeError(f"no weights were loaded, and no probe, so this model must not answer. {HOW_TO_LOAD}")
        self.probe = tuple(tensor.to(next(self.parameters()).device) for tensor in self.probe)
        self.gate, gate.lane = gate, guard_decoder(self.get_language_model(), self.sasa, self.probe, gate)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        probe = {}

        def others() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name.startswith("sasa.probe."):
                    probe[name.rsplit(".", 1)[-1]] = tensor.float()
                else:
                    yield name, tensor

        loaded = super().load_weights(others())
        weight, bias = probe.get("weight"), probe.get("bias")
        if weight is None or bias is None or not (weight.isfinite().all() and bias.isfinite() and weight.any()):
            raise ValueError(f"sasa.probe is missing, zero, NaN or infinite, so the gate cannot judge. {HOW_TO_LOAD}")
        self.probe = weight, bias
        return loaded

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return the logits (rows, vocabulary) of the decoder's output. Without a lane, the gate judges that output."""
        if self.probe is None or self.gate is None:
            raise RuntimeError("this model has no gate, so it must not answer. Serve it as docs/serving.md says.")
        if self.gate.lane is None:
            self.gate.probability = unsafe_probability(hidden_states, *self.probe)  # (rows,)
        else:
            hidden_states = hidden_states.chunk(4, dim=-1)[0].contiguous()  # (rows, hidden)
        return super().compute_logits(hidden_states)


class GuardedDecoder:
    """Mixin for a decoder's class: it returns projection and tapped states beside the main lane."""

    def forward(
        self, input_ids: Any, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Any = None,
        deepstack_input_embeds: Any = None,
    ) -> Tensor:  # fmt: skip
        """Return the end of the main lane, the projection, safety and semantic state, (tokens, 4 * hidden)."""
        if self.gate.stage == "aside":  # only in the proof, whose prompt has no picture. Compiled code skips this test
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds).repeat(1, 4)
        # Qwen3-VL adds picture features behind its first blocks, (tokens, hidden) each.
        added = [] if deepstack_input_embeds is None else list(deepstack_input_embeds.tensors.values())
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds  # (tokens, hidden)
        residual, taps, state = None, [], None
        for index, block in enumerate(self.layers):
            hidden, residual = block(positions, hidden, residual)
            hidden = hidden + added[index] if index < len(added) else hidden
            if index in self.tapped:
                hidden, layer, state = tap(hidden, residual, state, self.epsilon)  # (tokens, hidden) each
                taps.append(layer)
        main, _ = self.norm(hidden, residual)  # (tokens, hidden)
        return torch.cat([main, state, *taps], dim=-1)


# Torch's compiler cannot reorder a custom operator. Without it, the last norm ran before the last block.
@torch.library.custom_op("sasa::tap", mutates_args=())
def tap(hidden: Tensor, residual: Tensor, safety: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the next block's input, this block's output and the lane's state, (tokens, hidden) each. The state is this
    output or, given `safety`, the safety layer's output projected onto it."""
    state = hidden + residual  # (tokens, hidden)
    return hidden.clone(), state, state.clone() if safety is None else project(safety, state, epsilon)


tap.register_fake(lambda hidden, *_: tuple(torch.empty_like(hidden) for _ in range(3)))


def guard_decoder(language_model: Any, sasa: dict[str, Any], probe: Any, gate: Any) -> Lane | None:
    """Make a decoder return the projection. Return its lane, or None without one. Raise ValueError if unsupported."""
    graph = sasa["graph"]
    decoder = getattr(language_model, "model", language_model)
    name = f"{type(decoder).__module__}.{type(decoder).__name__}".removeprefix("vllm.model_executor.models.")
    if name not in DECODERS:
        raise ValueError(f"{name}: sasa-vllm does not know this decoder, so it cannot guard it.")
    # The path of a block's module ends in its number.
    indices: dict[str, list[int]] = {"block": [], "tap": [], "lane_block": []}
    for node in (node for node in graph if node["op"] in indices):
        indices[node["op"]].append(int(node["module"].rsplit(".", 1)[-1]))
    tokens = lane_tokens(sasa)
    if indices["block"] != list(range(len(decoder.layers))) or len(set(indices["tap"])) != (2 if tokens else 1):
        raise ValueError(f"config.sasa's graph has not the blocks of the decoder, or not its taps. {HOW_TO_LOAD}")
    if any(node["op"] == "lane_head" for node in graph):
        raise ValueError("this model's probe reads logits (lane_head), and sasa-vllm does not. Use transformers.")
    if not tokens:
        return None
    decoder.gate, decoder.tapped = gate, tuple(indices["tap"])  # the safety layer, then the semantic one
    decoder.epsilon = next(node["epsilon"] for node in graph if node["op"] == "projection")
    decoder.__class__ = type(f"Sasa{type(decoder).__name__}", (GuardedDecoder, type(decoder)), {})
    if not decoder.do_not_compile:  # compilation was set up when the decoder was made: set it up again
        decoder.cleanup()
        TorchCompileWithNoGuardsWrapper.__init__(decoder)
    return Lane(decoder, indices["lane_block"], tokens, probe)


def warn_of_causal_pictures(vllm_config: Any) -> None:
    """Warn that vLLM's attention on CPUs reads the pictures of Gemma 3 in one direction, guarded or not."""
    if vllm_config.model_config.is_mm_prefix_lm and current_platform.is_cpu():
        logger.warning(
            "this model reads a picture in both directions, and vLLM on a CPU does not: answers to pictures, and their "
            "verdicts, are not those of transformers. Serve it on a GPU, or text alone (--limit-mm-per-prompt)."
        )


@functools.cache
def __getattr__(name: str) -> type:
    """Return vLLM's class of a family, guarded, by the name that config.py registers. Else raise AttributeError."""
    stock_name = name.removeprefix("Sasa")
    if stock_name.removesuffix(GENERATES) not in FAMILIES:
        raise AttributeError(name)
    stock = ModelRegistry.models[stock_name].load_model_cls()
    return type(name, (GuardedModel, stock), {"__module__": __name__, "__doc__": stock.__doc__})
