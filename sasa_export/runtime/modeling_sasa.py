"""A vision-language model that carries its own guard (SASA, arXiv 2507.21637).

The model judges every prompt before it says a word. The idea, with h_s and h_f the outputs of the safety
block s and the semantic block f over the prompt:

    project(h_s, h_f)      = <h_s, h_f> / max(|h_f|^2, epsilon) * h_f      # (batch, tokens, hidden), float32
    second lane(p)         = norm(block_{L-1}(... block_{s+1}(p)))[last]   # (batch, hidden), the same weights
    unsafe_probability(x)  = sigmoid(w . x + b)                            # (batch,)
    gate(logits, verdict)  = logits, or the next token of the refusal      # (batch, kept, vocabulary)

`config.sasa["graph"]` lists these steps as nodes; this file executes them and knows no model family. Its
last lines name the classes of the family that this directory holds.
"""

import contextlib
import contextvars
import functools
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

FORMAT = 1  # of config.sasa; a directory of another format is refused
SEAL = "guarded by SASA: load it with AutoModelForImageTextToText.from_pretrained(..., trust_remote_code=True)"
LANE = ("tap", "projection", "lane_block", "lane_norm", "lane_head", "probe", "gate")  # what SASA adds
NOT_JUDGED = ("prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_early_exit", "assistant_model")
NOT_WHOLE = "a prompt is judged whole and on its own, which this way of running prevents. Run without it."
HOW_TO_LOAD = "Load the directory as sasa-export wrote it, or export it again."

# Logits of a refused row. The order is what counts: where a generation option forbids the wanted token, another
# word of the refusal follows, and where none is left the answer ends.
WANTED, REFUSAL, END, OTHER = 0.0, -5e2, -1e3, -1e4

if int(transformers.__version__.split(".")[0]) != 5:
    raise ImportError(
        f"this guarded model needs transformers 5, and {transformers.__version__} is installed. "
        "Install it with: pip install 'transformers>=5,<6'"
    )


# ------------------------------------------------------------------------------------------- the formulas


def project(safety: torch.Tensor, semantic: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The component of the safety state along the semantic state, token by token (the paper's Eq. 8).

    Args: both states (batch, tokens, hidden). Returns the same shape, in the dtype of `semantic`; the
    arithmetic is float32, since |h_f|^2 overflows half precision at massive activations.
    """
    h_s, h_f = safety.float(), semantic.float()  # (batch, tokens, hidden)
    alpha = (h_s * h_f).sum(-1, keepdim=True) / (h_f * h_f).sum(-1, keepdim=True).clamp_min(epsilon)
    return (alpha * h_f).to(semantic.dtype)  # (batch, tokens, hidden)


def unsafe_probability(state: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Logistic regression on the lane's state (batch, features): P(unsafe), (batch,), float32."""
    return torch.sigmoid((state.float() * weight.float()).sum(-1) + bias.float())


def gate(logits: torch.Tensor, wanted: torch.Tensor, refused: torch.Tensor, refusal: tuple[int, ...]) -> torch.Tensor:
    """Force the refusal where a position is refused, and leave every other logit untouched.

    Args:
        logits: (batch, kept, vocabulary).
        wanted: (batch, kept), the token of the refusal that is due.
        refused: (batch, kept), bool.
        refusal: the refusal's token ids, end of sequence last.
    """
    others = torch.full(logits.shape[-1:], OTHER, dtype=logits.dtype, device=logits.device)  # (vocabulary,)
    others[list(refusal)] = REFUSAL
    others[refusal[-1]] = END
    forced = others.expand_as(logits).scatter(-1, wanted.unsqueeze(-1), WANTED)  # (batch, kept, vocabulary)
    return torch.where(refused.unsqueeze(-1), forced, logits)


# How far the refusal has been spelled rides in the KV cache, as one more layer with a row per token: 0 is an
# allowed prompt, k + 1 that token k of the refusal comes next. So beams, batches and resets carry it.


def next_state(state: torch.Tensor, refusal_length: int) -> torch.Tensor:
    """The state (batch,) one token later."""
    return torch.where(state > 0, (state + 1).clamp(max=refusal_length), 0)


def state_rows(state: torch.Tensor, tokens: int, heads: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """The state (batch,) as keys of the extra layer: (batch, heads, tokens, size), like every other layer's."""
    row = state.to(dtype)[:, None, None, None].expand(-1, 1, tokens, 1)
    return nn.functional.pad(row, (0, size - 1, 0, 0, 0, heads - 1))


def cache_shape(text: Any) -> tuple[int, int, int]:
    """The number of blocks, key-value heads per block and the head size of a text configuration."""
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return text.num_hidden_layers, text.num_key_value_heads, size


# ----------------------------------------------------------------------------------- watching the main lane


@dataclass
class Recording:
    """What the main lane showed of its blocks during one forward pass."""

    outputs: dict[str, torch.Tensor] = field(default_factory=dict)  # module path -> (batch, tokens, hidden)
    arguments: dict[str, tuple[tuple, dict]] = field(default_factory=dict)  # module path -> args, kwargs


_recording: contextvars.ContextVar[Recording | None] = contextvars.ContextVar("recording", default=None)


def _see(path: str, keep_output: bool, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    recording = _recording.get()
    if recording is None:  # the second lane runs the same blocks: nothing to see then
        return
    recording.arguments[path] = (args, kwargs)
    if keep_output:
        recording.outputs[path] = output[0] if isinstance(output, tuple) else output


def watch(model: nn.Module, graph: list[dict[str, Any]]) -> list[Any]:
    """Hook the blocks that the graph taps or replays. Returns the handles that remove the hooks again."""
    tapped = [node["module"] for node in graph if node["op"] == "tap"]
    replayed = [node["module"] for node in graph if node["op"] == "lane_block"]
    return [
        model.get_submodule(path).register_forward_hook(functools.partial(_see, path, path in tapped), with_kwargs=True)
        for path in dict.fromkeys(tapped + replayed)
    ]


@contextlib.contextmanager
def recording() -> Iterator[Recording]:
    """Within this context, watched blocks leave their outputs and arguments in the Recording."""
    seen = Recording()
    token = _recording.set(seen)
    try:
        yield seen
    finally:
        _recording.reset(token)


# ------------------------------------------------------------------------------------- executing the graph


def _replay(module: nn.Module, state: torch.Tensor, seen: tuple[tuple, dict]) -> torch.Tensor:
    """Run a block on another state with the arguments of the main lane, away from the main lane's cache."""
    args, kwargs = seen
    kwargs = dict(kwargs)
    for name in ("past_key_values", "past_key_value", "layer_past"):
        if name in kwargs:
            kwargs[name] = None
    if "use_cache" in kwargs:
        kwargs["use_cache"] = False
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 4:  # a static cache's mask spans its whole length
        kwargs["attention_mask"] = mask[..., : state.shape[1]]
    elif mask is not None and not isinstance(mask, torch.Tensor):
        raise NotImplementedError(
            f"the second lane cannot replay an attention mask of type {type(mask).__name__}. "
            "Load the model with attn_implementation='sdpa' or 'eager'."
        )
    if args:
        output = module(state, *args[1:], **kwargs)
    else:
        kwargs["hidden_states"] = state
        output = module(**kwargs)
    return output[0] if isinstance(output, tuple) else output  # (batch, tokens, hidden)


def run_graph(
    model: nn.Module, graph: list[dict[str, Any]], seen: Recording, judged: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Execute the nodes that SASA adds to the main lane, except the gate.

    Args:
        graph: `config.sasa["graph"]`; nodes of other operations (the main lane's own) are passed over.
        seen: the main lane's recording.
        judged: (batch,), the position whose state the probe reads.

    Returns the value of each node by its name.
    """
    values: dict[str, torch.Tensor] = {}
    for node in graph:
        operation, inputs = node["op"], node["inputs"]
        if operation == "tap":
            value = seen.outputs[node["module"]]  # (batch, tokens, hidden)
        elif operation == "projection":
            safety, semantic = (values[name] for name in inputs)
            value = project(safety.to(semantic.device), semantic, node["epsilon"])
        elif operation == "lane_block":
            path = node["module"]
            value = _replay(model.get_submodule(path), values[inputs[0]], seen.arguments[path])
        elif operation == "lane_norm":
            state = values[inputs[0]]  # (batch, tokens, hidden)
            rows = torch.arange(state.shape[0], device=state.device)
            last = state[rows, judged.to(state.device)]  # (batch, hidden)
            value = model.get_submodule(node["module"])(last.unsqueeze(1)).squeeze(1)  # (batch, hidden)
        elif operation == "lane_head":
            value = model.get_submodule(node["module"])(values[inputs[0]])  # (batch, vocabulary)
            if node.get("softcap"):
                value = torch.tanh(value.float() / node["softcap"]) * node["softcap"]
        elif operation == "probe":
            probe = model.get_submodule(node["module"])
            state = values[inputs[0]]
            value = unsafe_probability(state, probe.weight.to(state.device), probe.bias.to(state.device))  # (batch,)
        else:
            continue
        values[node["name"]] = value
    return values


def last_real(attention_mask: Any, tokens: int, like: torch.Tensor) -> torch.Tensor:
    """The position of each row's last real token of a prompt, (batch,), under left, right or no padding.

    The mask is (batch, tokens), or (batch, 1, tokens, keys) as static caches get it, one a type of layer.
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("full_attention", next(iter(attention_mask.values())))
    if not isinstance(attention_mask, torch.Tensor):
        return torch.full((like.shape[0],), tokens - 1, device=like.device)
    if attention_mask.dim() == 2:
        real = attention_mask[:, -tokens:] != 0  # (batch, tokens)
    else:  # a real token is one that some token sees; masks are bool, or 0 where seen and very negative elsewhere
        seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask > -1.0
        real = seen.any(-2)[:, 0, :tokens].expand(like.shape[0], tokens)  # (batch, tokens)
    order = torch.arange(1, tokens + 1, device=real.device)  # (tokens,)
    return (real * order).amax(-1).sub(1).clamp_min(0)  # (batch,)


# ----------------------------------------------------------------------------------------------- the model


class Probe(nn.Module):
    """The linear probe: weight (features,) and bias (), float32 whatever the model is cast to."""

    def __init__(self, features: int) -> None:
        super().__init__()
        unset = float("nan")  # a probe that was never loaded must not pass for one
        self.weight = nn.Parameter(torch.full((features,), unset, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.full((), unset, dtype=torch.float32), requires_grad=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> "Probe":
        before = {name: tensor.data for name, tensor in self.named_parameters()}
        super()._apply(fn, recurse)
        for name, tensor in self.named_parameters():
            if tensor.dtype != torch.float32:  # model.half() and the like move the probe, but do not round it
                tensor.data = before[name].to(tensor.device)
        return self

    def check(self) -> None:
        if self.weight.is_meta:  # offloaded: nothing to look at here
            return
        if not (torch.isfinite(self.weight).all() and torch.isfinite(self.bias)):
            raise ValueError(f"sasa.probe holds NaN or infinity, so the gate cannot judge. {HOW_TO_LOAD}")
        if not self.weight.any():
            raise ValueError(f"sasa.probe.weight is all zero, so the gate cannot judge. {HOW_TO_LOAD}")


def check_settings(sasa: Any) -> dict[str, Any]:
    """Return config.sasa, or raise ValueError where the gate could not run on it."""
    needed = (
        "format",
        "safety_layer",
        "semantic_layer",
        "epsilon",
        "threshold",
        "refusal_token_ids",
        "graph",
    )
    if not isinstance(sasa, dict) or any(name not in sasa for name in needed):
        raise ValueError(f"config.json has no complete `sasa` entry, so there is no gate. {HOW_TO_LOAD}")
    if sasa["format"] != FORMAT:
        raise ValueError(f"config.sasa has format {sasa['format']}, this file reads {FORMAT}. {HOW_TO_LOAD}")
    if not 0 <= sasa["safety_layer"] < sasa["semantic_layer"]:
        raise ValueError(f"config.sasa needs 0 <= safety_layer < semantic_layer. {HOW_TO_LOAD}")
    if not 0.0 < sasa["threshold"] < 1.0 or not sasa["refusal_token_ids"]:
        raise ValueError(f"config.sasa has no usable threshold or refusal. {HOW_TO_LOAD}")
    if not _is_sasa(sasa["graph"], sasa):
        raise ValueError(f"config.sasa's graph is not that of its layers, from tap to gate. {HOW_TO_LOAD}")
    return sasa


def _is_sasa(graph: list[dict[str, Any]], sasa: dict[str, Any]) -> bool:
    """Is this graph the main lane, and behind it exactly the chain that the layers of `sasa` call for?"""
    main: dict[Any, Any] = {node.get("index"): node for node in graph if node["op"] == "block"}
    safety, semantic = sasa["safety_layer"], sasa["semantic_layer"]
    if sorted(main) != list(range(len(main))) or semantic not in main:
        return False
    chain = [node for node in graph if node["op"] in LANE]
    lane = [main[index]["module"] for index in range(safety + 1, len(main))]
    taps = [main[safety]["module"], main[semantic]["module"]]
    wanted = [*(("tap", path) for path in taps), ("projection", None), *(("lane_block", path) for path in lane)]
    wanted += [("lane_norm", None)]
    tail = ["lane_head", "probe", "gate"] if sasa.get("probe_space") == "logits" else ["probe", "gate"]
    found = [(node["op"], node.get("module") if node["op"] in ("tap", "lane_block") else None) for node in chain]
    if found != wanted + [(operation, None) for operation in tail]:
        return False
    names = [node["name"] for node in chain]
    reads = [node["inputs"] for node in chain]
    follows = all(reads[at] == [names[at - 1]] for at in range(3, len(chain) - 1))
    projects = reads[2] == names[:2] and chain[2].get("epsilon") == sasa["epsilon"]
    return follows and projects and reads[-1][-1:] == [names[-2]]


class GuardedConfig:
    """Mixed into a family's configuration: it opens the seal on which the stock configuration breaks.

    The sealed `id2label` of each nested configuration carries the message; a stock class cannot read it, so
    it can never load the weights without the gate.
    """

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        config_dict = {key: _opened(value) for key, value in config_dict.items()}
        config_dict = {key: value for key, value in config_dict.items() if value != {}}
        check_settings(config_dict.get("sasa"))
        return super().from_dict(config_dict, **kwargs)

    def to_json_string(self, *args: Any, **kwargs: Any) -> str:
        text = super().to_json_string(*args, **kwargs)
        return json.dumps(sealed(json.loads(text)), indent=2, sort_keys=True) + "\n"


def sealed(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Seal the nested configurations of a config.json, so that stock classes refuse it."""
    out = dict(config_dict)
    for name in ("text_config", "vision_config"):
        out[name] = {**out.get(name, {}), "id2label": {SEAL: 0}}
    return out


def _opened(value: Any) -> Any:
    if isinstance(value, dict) and SEAL in (value.get("id2label") or {}):
        return {key: item for key, item in value.items() if key != "id2label"}
    return value


class GuardedModel:
    """Mixed into a family's ...ForConditionalGeneration: judges each prompt, then lets it answer or refuses."""

    _keep_in_fp32_modules_strict = ("sasa",)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if GuardedModel not in cls.__bases__:  # a subclass of a guarded class inherits its gate
            return
        family = cls.__bases__[cls.__bases__.index(GuardedModel) + 1]  # the stock class
        cls.forward = _guarded(family.forward)
        stock, own = family.config_class.model_type, cls.config_class.model_type
        mapping = get_checkpoint_conversion_mapping(family.__name__) or get_checkpoint_conversion_mapping(stock)
        if mapping is not None:  # old names in the shards are renamed as for the stock class
            register_checkpoint_conversion_mapping(own, mapping, overwrite=True)

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        text = config.get_text_config(decoder=True)
        settings = check_settings(getattr(config, "sasa", None))
        if sum(node["op"] == "block" for node in settings["graph"]) != text.num_hidden_layers:
            raise ValueError(f"config.sasa's graph has not as many blocks as the decoder. {HOW_TO_LOAD}")
        if not all(0 <= token < text.vocab_size for token in settings["refusal_token_ids"]):
            raise ValueError(f"config.sasa's refusal has tokens outside the vocabulary. {HOW_TO_LOAD}")
        features = text.vocab_size if settings.get("probe_space") == "logits" else text.hidden_size
        self.sasa = nn.Module()
        self.sasa.probe = Probe(features)
        watch(self, settings["graph"])
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(problem):
                names = sorted(str(name) for name in info[problem])
                raise ValueError(
                    f"{problem.replace('_', ' ')} in the guarded model: {', '.join(names[:5])}"
                    f"{' ...' if len(names) > 5 else ''} ({len(names)} in all). {HOW_TO_LOAD}"
                )
        model.sasa.probe.check()
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        owner = next(cls for cls in type(self).__mro__ if GuardedModel in cls.__bases__)
        spec = sys.modules[owner.__module__].__spec__
        Path(save_directory, "modeling_sasa.py").write_text(spec.loader.get_source(spec.name), encoding="utf-8")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        given = [value for value in (*args, kwargs.get("generation_config")) if isinstance(value, GenerationConfig)]
        settings = {**vars(given[0] if given else self.generation_config), **kwargs}
        for way in NOT_JUDGED:
            if settings.get(way):
                raise NotImplementedError(f"{way}: {NOT_WHOLE}")
        if "paged" in str(settings.get("cache_implementation")):
            raise NotImplementedError(f"cache_implementation='paged': {NOT_WHOLE}")
        return super().generate(*args, **kwargs)

    def _no_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"continuous batching: {NOT_WHOLE}")

    generate_batch = init_continuous_batching = continuous_batching_context_manager = _no_continuous_batching

    def _sasa_forward(self, forward: Callable, kwargs: dict[str, Any]) -> Any:
        as_dictionary = kwargs.pop("return_dict", None)
        cache = kwargs.get("past_key_values")
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        fed = ids if ids is not None else embeds  # (batch, tokens[, hidden])
        if fed is None:
            return forward(self, **kwargs)  # the family's own error says what is missing
        if "paged" in str(self.config._attn_implementation) or kwargs.get("cu_seq_lens_q") is not None:
            raise NotImplementedError(f"packed prompts: {NOT_WHOLE}")
        past = 0 if cache is None else int(cache.get_seq_length())
        if past == 0:
            output = self._judge(forward, kwargs, fed, ids)
        else:
            output = self._continue(forward, kwargs, fed, cache, past)
        if as_dictionary is None:
            as_dictionary = self.config.return_dict
        return output if as_dictionary else output.to_tuple()

    def _judge(self, forward: Callable, kwargs: dict, fed: torch.Tensor, ids: torch.Tensor | None) -> Any:
        """A prompt: both lanes, the verdict, and the first token of the refusal where it is refused."""
        settings = self.config.sasa
        refusal = tuple(settings["refusal_token_ids"])
        with recording() as seen:
            output = forward(self, **kwargs, return_dict=True)
        tokens = fed.shape[1]
        last = last_real(kwargs.get("attention_mask"), tokens, fed)  # (batch,)
        cache = output.past_key_values
        if cache is None and ids is not None:
            # Without a cache every step feeds the whole text again: how far the answer is stands in the ids.
            judged, spelled = read_progress(ids, last, refusal, tuple(settings.get("generation_prompt_ids", ())))
        else:
            judged, spelled = last, torch.zeros_like(last)
        values = run_graph(self, settings["graph"], seen, judged)
        probability = next(values[node["name"]] for node in settings["graph"] if node["op"] == "probe")  # (batch,)
        refused = ~(probability < settings["threshold"])  # (batch,); NaN is refused

        logits = output.logits  # (batch, kept, vocabulary)
        kept = torch.arange(tokens, device=logits.device)  # (kept,)
        keep = kwargs.get("logits_to_keep", 0)
        kept = kept[keep] if isinstance(keep, torch.Tensor) else kept[-keep:] if keep else kept
        last, spelled, refused = (value.to(logits.device) for value in (last, spelled, refused))
        due = torch.tensor(refusal, device=logits.device)[spelled]  # (batch,)
        reached = refused[:, None] & (kept[None, :] >= last[:, None])  # (batch, kept)
        output.logits = gate(logits, due[:, None].expand_as(reached), reached, refusal)
        if cache is not None:
            self._store(cache, torch.where(refused, spelled + 1, 0), tokens)
        output["unsafe_probability"] = probability
        return output

    def _continue(self, forward: Callable, kwargs: dict, fed: torch.Tensor, cache: Cache, past: int) -> Any:
        """An answer under way: the next token of the refusal where the prompt was refused."""
        if fed.shape[1] != 1:
            raise NotImplementedError(
                f"{fed.shape[1]} tokens on top of a cache of {past} would not be judged. Feed the whole prompt "
                "in one call without past_key_values; prefill_chunk_size, assisted decoding and prompt lookup "
                "are not supported by this guarded model."
            )
        refusal = tuple(self.config.sasa["refusal_token_ids"])
        state = self._load(cache, past)  # (batch,)
        output = forward(self, **kwargs, return_dict=True)
        state = next_state(state, len(refusal))
        self._store(cache, state, 1)
        logits = output.logits  # (batch, 1, vocabulary)
        state = state.to(logits.device)
        due = torch.tensor(refusal, device=logits.device)[(state - 1).clamp_min(0)]  # (batch,)
        output.logits = gate(logits, due[:, None], state[:, None] > 0, refusal)
        output.unsafe_probability = None
        return output

    def _store(self, cache: Cache, state: torch.Tensor, tokens: int) -> None:
        text = self.config.get_text_config(decoder=True)
        index, heads, size = cache_shape(text)
        first = cache.layers[0]
        if len(cache.layers) == index:
            static = isinstance(first, StaticLayer)
            length = max(layer.get_max_length() for layer in cache.layers)
            cache.layers.append(StaticLayer(length) if static else DynamicLayer())
        rows = state_rows(state, tokens, heads, size, first.dtype)  # (batch, key-value heads, tokens, head size)
        cache.update(rows, torch.zeros_like(rows), index)

    def _load(self, cache: Cache, past: int) -> torch.Tensor:
        index = self.config.get_text_config(decoder=True).num_hidden_layers
        if len(cache.layers) <= index or int(cache.get_seq_length(index)) != past:
            raise ValueError(
                "past_key_values holds tokens that this guarded model has not judged. Start from the whole "
                "prompt without past_key_values."
            )
        return cache.layers[index].keys[:, 0, past - 1, 0].round().long()  # (batch,)


def read_progress(
    ids: torch.Tensor, last: torch.Tensor, refusal: tuple[int, ...], generation_prompt: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the prompt ends and how much of the refusal follows it, read off the token ids (batch, tokens).

    The prompt ends with the last generation prompt of the chat template, or, where there is none or another turn
    follows it, before the longest beginning of the refusal that ends the ids. Returns the judged position (batch,)
    and the number of refusal tokens already spelled (batch,).
    """
    positions = torch.arange(ids.shape[1], device=ids.device)  # (tokens,)
    spelled = torch.zeros_like(last)
    for count in range(1, len(refusal)):
        if count > ids.shape[1]:
            break
        ends = _ends_of(ids, refusal[:count])  # (batch, tokens)
        spelled = torch.where(ends.gather(1, last[:, None])[:, 0], count, spelled)
    judged = (last - spelled).clamp_min(0)
    if generation_prompt and len(generation_prompt) <= ids.shape[1]:
        ends = _ends_of(ids, generation_prompt) & (positions <= last[:, None])
        opened = (ends * positions).amax(-1)  # (batch,)
        # An answer holds no end of a turn and no beginning of one; what does is a prompt to its very end.
        turns = (ids == refusal[-1]) | (ids == generation_prompt[0])
        turns &= (positions > opened[:, None]) & (positions <= last[:, None])
        judged = torch.where(ends.any(-1) & ~turns.any(-1), opened, judged)
    return judged, spelled


def _ends_of(ids: torch.Tensor, pattern: tuple[int, ...]) -> torch.Tensor:
    """(batch, tokens), bool: does `pattern` end at this position?"""
    hits = torch.ones_like(ids, dtype=torch.bool)
    for offset, token in enumerate(reversed(pattern)):
        hits &= torch.cat([torch.zeros_like(hits[:, :offset]), ids[:, : ids.shape[1] - offset] == token], dim=1)
    return hits


def _guarded(forward: Callable) -> Callable:
    """The family's forward with the gate around it; generate() still reads the family's own signature."""
    names = list(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)
    def guarded_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._sasa_forward(forward, dict(zip(names, args, strict=False), **kwargs))

    return guarded_forward
