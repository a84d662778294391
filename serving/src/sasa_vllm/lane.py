"""The second lane: the model's own blocks, run again over the last tokens of prompts.

It runs where prompts end, outside vLLM's forward. Its attention covers only these tokens, and therefore leaves
nothing in a cache that prompts share, or in a CUDA graph.
"""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from vllm.model_executor.layers.attention import Attention

from sasa_vllm.formulas import unsafe_probability


class Tail(NamedTuple):
    """The last tokens of a prompt, as far as it was computed."""

    states: Tensor  # (tokens, 3 * hidden): projection, safety layer, semantic layer
    positions: Tensor  # (tokens,), or (axes, tokens)
    end: int  # number of the prompt's computed tokens


class Lane:
    """The second lane of a decoder over `tokens` tokens, and the probe (weight and bias). The probe also reads the
    states of both layers."""

    def __init__(self, decoder: Any, indices: list[int], tokens: int, probe: tuple[Tensor, ...]) -> None:
        self.tokens, self.norm, self.probe = tokens, decoder.norm, probe
        self.blocks = [lane_block(decoder.layers[index], tokens) for index in indices]

    def follow(self, tail: Tail | None, states: Tensor, positions: Tensor, end: int) -> Tail:
        """Return the tail of a prompt that was computed up to `end`, now with these states (tokens, 3 * hidden) and
        positions. The earlier tail is dropped if it does not end where they begin."""
        begin = end - len(states)
        states, positions = states[-self.tokens :], positions[..., -self.tokens :]  # (up to self.tokens, 3 * hidden)
        if tail is not None and tail.end == begin and len(states) < self.tokens:
            states = torch.cat([tail.states, states])[-self.tokens :]  # (up to self.tokens, 3 * hidden)
            positions = torch.cat([tail.positions, positions], dim=-1)[..., -self.tokens :]
        return Tail(states.clone(), positions.clone(), end)  # the next step reuses their memory

    def is_whole(self, tail: Tail, prompt: int) -> bool:
        """Return whether a tail holds all tokens that the lane runs over in a prompt of `prompt` tokens."""
        return tail.end == prompt and len(tail.states) == min(self.tokens, prompt)

    def judge(self, tails: list[Tail]) -> Tensor:
        """Return P(unsafe) of prompts, (rows,), from their tails."""
        rows = [(tail, self.tokens - len(tail.states)) for tail in tails]  # with padding behind, which no token sees
        whole = torch.cat([pad(tail.states, (0, 0, 0, more)) for tail, more in rows])  # (rows * tokens, 3 * hidden)
        state, *layers = (part.contiguous() for part in whole.chunk(3, dim=-1))  # (rows * tokens, hidden) each
        positions = torch.cat([pad(tail.positions, (0, more)) for tail, more in rows], dim=-1)  # (..., rows * tokens)
        residual = None
        for block in self.blocks:
            state, residual = block(positions, state, residual)
        last = [(row + 1) * self.tokens - 1 - more for row, (_, more) in enumerate(rows)]
        ends = [self.norm(state[last], residual[last])[0]]  # (rows, hidden)
        ends += [self.norm(layer[last]) for layer in layers]  # (rows, hidden) each
        return unsafe_probability(torch.cat(ends, dim=-1), *self.probe)


class LaneAttention(nn.Module):
    """Replaces vLLM's Attention: each token attends to itself and to those before it in its row."""

    def __init__(self, attention: Any, tokens: int) -> None:
        super().__init__()
        if type(attention) is not Attention or attention.kv_sharing_target_layer_name or attention.has_sink:
            raise ValueError(f"{attention.layer_name}: sasa-vllm does not know this attention, so no lane can have it.")
        self.tokens, self.size, self.scale = tokens, attention.head_size, attention.impl.scale
        seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()  # (tokens, tokens)
        self.seen = seen if attention.sliding_window is None else seen.triu(1 - attention.sliding_window)

    def forward(self, *projected: Tensor) -> Tensor:
        """Return the attention's output for query, key and value, (rows * tokens, heads * size) each."""
        query, key, value = (
            each.reshape(-1, self.tokens, each.shape[-1] // self.size, self.size).transpose(1, 2) for each in projected
        )  # (rows, heads, tokens, size)
        seen = self.seen.to(query.device)  # (tokens, tokens)
        out = scaled_dot_product_attention(query, key, value, seen, scale=self.scale, enable_gqa=True)
        return out.transpose(1, 2).reshape(projected[0].shape)  # (rows * tokens, heads * size)


def lane_block(block: Any, tokens: int) -> Any:
    """Return a copy of a block that shares all of its modules and weights, except Attention."""
    twin, attention = copy.copy(block), copy.copy(block.self_attn)
    attention._modules = {**attention._modules, "attn": LaneAttention(attention.attn, tokens)}
    twin._modules = {**twin._modules, "self_attn": attention}
    return twin
