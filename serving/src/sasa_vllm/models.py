"""vLLM's own class of each family, extended by the second lane.

The lane's blocks are copies of the decoder's blocks that share every module, and so every weight, but for an Attention
each with a KV cache of its own. Its keys and values are ordinary cache blocks of vLLM: whatever caches, shares, chunks
or preempts prompts covers them.
"""

import copy
import functools
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm import ModelRegistry
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.gemma3 import Gemma3Model
from vllm.model_executor.models.glm4 import Glm4Model
from vllm.model_executor.models.llama import LlamaModel
from vllm.model_executor.models.mistral import MistralModel
from vllm.model_executor.models.qwen2 import Qwen2Model
from vllm.model_executor.models.qwen3_vl import Qwen3LLMModel
from vllm.platforms import current_platform

from sasa_vllm.config import FAMILIES, WORKER, check_engine, check_version
from sasa_vllm.formulas import project, unsafe_probability
from sasa_vllm.settings import HOW_TO_LOAD, check_settings, follow_refusal

logger = init_logger("vllm.sasa")

# Decoders whose forward is the loop over blocks that `GuardedDecoder.forward` writes out.
DECODERS = (LlamaModel, MistralModel, Qwen2Model, Qwen3LLMModel, Gemma3Model, Glm4Model)


class GuardedModel:
    """Mixed into a family's class: it runs both lanes, and reads P(unsafe) where tokens are sampled."""

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
        self.probe: tuple[torch.Tensor, torch.Tensor] | None = None  # weight (features,) and bias (), float32
        self.gate: Any = None

    def guard(self, gate: Any) -> None:
        """Run the lane from now on, and show P(unsafe) to a gate. The worker calls this when all weights are loaded."""
        if self.probe is None:
            raise RuntimeError(f"no weights were loaded, and no probe, so this model must not answer. {HOW_TO_LOAD}")
        device = next(self.parameters()).device
        self.probe = self.probe[0].to(device), self.probe[1].to(device)
        # Not as a submodule: the decoder is one already.
        self.__dict__["decoder"] = guard_decoder(self.get_language_model(), self.sasa["graph"])
        self.gate = gate

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        probe = {}

        def others() -> Iterable[tuple[str, torch.Tensor]]:
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

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The logits (rows, vocabulary) of states (rows, lanes * hidden); P(unsafe) of the rows goes to the gate."""
        if self.probe is None or self.gate is None:
            raise RuntimeError("this model has no gate, so it must not answer. Serve it as docs/serving.md says.")
        main, *lane = hidden_states.chunk(self.decoder.lanes, dim=-1)  # (rows, hidden) each
        state = lane[0] if lane else main  # (rows, hidden)
        self.gate.probability = unsafe_probability(state, *self.probe)  # (rows,)
        return super().compute_logits(main.contiguous())


class GuardedDecoder:
    """Mixed into a decoder's class: it runs the lane behind the main lane."""

    def forward(
        self,
        input_ids: Any,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Any = None,
        deepstack_input_embeds: Any = None,
    ) -> torch.Tensor:
        """The ends of both lanes, (tokens, 2 * hidden); of the main lane alone where there is no projection.

        Args: deepstack_input_embeds: what Qwen3-VL adds of a picture behind its first blocks, (tokens, hidden) each.
        """
        added = [] if deepstack_input_embeds is None else list(deepstack_input_embeds.tensors.values())
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds  # (tokens, hidden)
        residual, taps = None, []
        for index, block in enumerate(self.layers):
            hidden, residual = block(positions, hidden, residual)
            hidden = hidden + added[index] if index < len(added) else hidden
            if index in self.tapped:
                taps.append(hidden + residual)  # (tokens, hidden)
        main, _ = self.norm(hidden, residual)  # (tokens, hidden)
        if self.lanes == 1:
            return main
        lane, residual = project(*taps, self.epsilon), None  # (tokens, hidden)
        for block in self.lane:
            lane, residual = block(positions, lane, residual)
        lane = self.norm(lane) if residual is None else self.norm(lane, residual)[0]  # (tokens, hidden)
        return torch.cat([main, lane], dim=-1)


def guard_decoder(language_model: Any, graph: list[dict[str, Any]]) -> Any:
    """Let the decoder of a language model run the lane of `graph`, whose blocks it gets here."""
    decoder = getattr(language_model, "model", language_model)
    if type(decoder) not in DECODERS:
        raise ValueError(f"{type(decoder).__name__}: sasa-vllm does not know this decoder, so it cannot guard it.")
    indices = {op: [block_index(node) for node in graph if node["op"] == op] for op in ("block", "tap", "lane_block")}
    if indices["block"] != list(range(len(decoder.layers))):
        raise ValueError(f"config.sasa's graph has not the blocks of the decoder. {HOW_TO_LOAD}")
    if any(node["op"] == "lane_head" for node in graph):
        raise ValueError(
            "the probe of this model reads logits (lane_head), which sasa-vllm does not. Use transformers."
        )
    projections = [node for node in graph if node["op"] == "projection"]
    if any(node.get("tokens") for node in projections):
        raise ValueError("sasa-vllm runs the lane over all tokens. Export this model with --lane-tokens all.")
    decoder.lanes = 1 + len(projections)
    decoder.tapped = tuple(indices["tap"]) if projections else ()  # the safety layer, then the semantic one
    decoder.epsilon = projections[0]["epsilon"] if projections else 0.0
    # In a tuple: a list of modules would be saved, loaded and counted twice.
    decoder.lane = tuple(lane_block(decoder.layers[index], len(decoder.layers)) for index in indices["lane_block"])
    decoder.__class__ = type(f"Sasa{type(decoder).__name__}", (GuardedDecoder, type(decoder)), {})
    if not decoder.do_not_compile:  # what is compiled was chosen when the decoder was made: choose anew
        decoder.cleanup()
        TorchCompileWithNoGuardsWrapper.__init__(decoder)
    return decoder


def warn_of_causal_pictures(vllm_config: Any) -> None:
    """vLLM's attention on CPUs reads the pictures of Gemma 3 in one direction, guarded or not."""
    if vllm_config.model_config.is_mm_prefix_lm and current_platform.is_cpu():
        logger.warning(
            "this model reads a picture in both directions, and vLLM on a CPU does not: answers to pictures, and their "
            "verdicts, are not those of transformers. Serve it on a GPU, or text alone (--limit-mm-per-prompt)."
        )


def block_index(node: dict[str, Any]) -> int:
    """Which block a node of the graph runs: its module's path ends in the number."""
    return int(node["module"].rsplit(".", 1)[-1])


def lane_block(block: Any, count: int) -> Any:
    """A block that shares all modules of another but for its Attention, which gets the place `count` further on."""
    attention = block.self_attn.attn
    if type(attention) is not Attention or attention.kv_sharing_target_layer_name is not None:
        raise ValueError(f"{attention.layer_name}: the lane cannot have keys and values of its own in such a layer.")
    twin = twin_of(attention)
    twin.impl, twin.kv_cache = copy.copy(attention.impl), torch.tensor([])
    twin.layer_name = re.sub(r"(?<=\.layers\.)\d+", lambda found: str(int(found[0]) + count), attention.layer_name)
    layers = attention_layers()
    if twin.layer_name in layers:
        raise ValueError(f"{twin.layer_name}: there is such a layer already.")
    layers[twin.layer_name] = twin
    return twin_of(block, self_attn=twin_of(block.self_attn, attn=twin))


def twin_of(module: nn.Module, **children: nn.Module) -> Any:
    """A shallow copy that shares everything with a module but for these children."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **children}
    return twin


def attention_layers() -> dict[str, Any]:
    """The Attention layers of the engine by name, from which it allocates and finds their caches."""
    from vllm.config import get_current_vllm_config

    return get_current_vllm_config().compilation_config.static_forward_context


@functools.cache
def __getattr__(name: str) -> type:
    """vLLM's class of a family, guarded, by the name that config.py registers it under."""
    stock_name = name.removeprefix("Sasa")
    if stock_name not in FAMILIES.values():
        raise AttributeError(name)
    stock = ModelRegistry.models[stock_name].load_model_cls()
    return type(name, (GuardedModel, stock), {"__module__": __name__, "__doc__": stock.__doc__})
