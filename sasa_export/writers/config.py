"""config.json of a patched model: a type of its own, sealed against stock classes, with all settings of SASA."""

import json
from pathlib import Path
from typing import Any

from sasa_export.errors import EmitError
from sasa_export.graph import LayerGraph
from sasa_export.graph.rewrite import LaneSettings
from sasa_export.models import Source
from sasa_export.models.contents import read_object
from sasa_export.runtime.bundle import MODELING_FILE, guarded_type, modeling_source
from sasa_export.runtime.settings import FORMATS, LONGEST_REFUSAL, refusal_tokens, sealed

THINKING = ("enable_thinking", "thinking")  # options of chat templates: of Qwen's and GLM's, of Kimi's


def sasa_settings(
    source: Source,
    processor: Any,
    graph: LayerGraph,
    lane: LaneSettings,
    *,
    layers_from: str,
    threshold: float,
    refusal: str,
    gate: str,
    known: list[dict[str, Any]],
) -> dict[str, Any]:
    """What config.json holds under `sasa`; the modeling file executes its `graph`.

    By the `known` prompts a model sees whether its weights are others. What is OPERATOR's may be changed there.
    """
    opening = generation_prompt_ids(processor)
    others = other_generation_prompts(processor, opening)
    return {
        "format": FORMATS[-1],
        "safety_layer": lane.safety_layer,
        "semantic_layer": lane.semantic_layer,
        "layers_from": layers_from,
        "epsilon": lane.epsilon,
        "gate": gate,
        "prove": None,  # on a transformers that it was not tried on
        "begun_answers": "error",
        "known": known,
        "threshold": threshold,
        "refusal": refusal,
        "tokenized_refusal": refusal,
        "refusal_token_ids": refusal_ids(processor, source.directory, refusal),
        "generation_prompt_ids": opening,
        "other_generation_prompt_ids": others,
        "turn_token_ids": turn_token_ids(processor, source.directory, opening),
        "graph": graph.to_json(),
    }


def write_config(source: Source, sasa: dict[str, Any], classes: tuple[type, type], directory: Path) -> None:
    """Write config.json and the modeling file that it names."""
    config_class, model_class = classes
    module = MODELING_FILE.removesuffix(".py")
    config = dict(source.config)
    config["model_type"] = guarded_type(source.config["model_type"])
    config["architectures"] = [f"Sasa{model_class.__name__}"]
    config["auto_map"] = {
        "AutoConfig": f"{module}.Sasa{config_class.__name__}",
        "AutoModelForImageTextToText": f"{module}.Sasa{model_class.__name__}",
        "AutoModelForMultimodalLM": f"{module}.Sasa{model_class.__name__}",  # what `transformers serve` loads
    }
    config["sasa"] = sasa
    (directory / "config.json").write_text(config_text(sealed(config)), encoding="utf-8")
    (directory / MODELING_FILE).write_text(modeling_source(config_class, model_class), encoding="utf-8")


def config_text(config: dict[str, Any]) -> str:
    """config.json as it is written."""
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def refusal_ids(processor: Any, directory: Path, refusal: str) -> list[int]:
    """The refusal as token ids, end of sequence last."""
    tokenizer = processor.tokenizer
    ends = _end_tokens(directory) or [tokenizer.eos_token_id]
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]
    try:
        ids = refusal_tokens(tokenizer, refusal, int(end), getattr(processor, "image_token_id", None))
    except ValueError as error:
        raise EmitError(f"--refusal: {error}") from None
    if len(ids) > LONGEST_REFUSAL:
        raise EmitError(f"the refusal has {len(ids)} tokens, and {LONGEST_REFUSAL} fit. Shorten --refusal.")
    return ids


def generation_prompt_ids(processor: Any, **options: bool) -> list[int]:
    """The token ids with which the chat template, given its options, opens the answer; empty where it opens none."""
    chat = [{"role": "user", "content": [{"type": "text", "text": "a question"}]}]
    with_prompt = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, **options)
    without = processor.apply_chat_template(chat, add_generation_prompt=False, tokenize=False, **options)
    if not with_prompt.startswith(without):
        return []
    tokenizer = processor.tokenizer
    whole = tokenizer.encode(with_prompt, add_special_tokens=False)
    alone = tokenizer.encode(with_prompt[len(without) :], add_special_tokens=False)
    shared = 0  # a tokenizer may join the first piece with what stands before it
    while shared < min(len(whole), len(alone)) and whole[-1 - shared] == alone[-1 - shared]:
        shared += 1
    return [int(token) for token in alone[len(alone) - shared :]]


def other_generation_prompts(processor: Any, opening: list[int]) -> list[list[int]]:
    """What the chat template writes in place of its default one, `opening`, where thinking is turned on or off."""
    found: list[list[int]] = []
    for options in ({name: on} for name in THINKING for on in (True, False)):
        ids = generation_prompt_ids(processor, **options)
        if ids and ids not in (opening, *found):
            found.append(ids)
    return found


def turn_token_ids(processor: Any, directory: Path, opening: list[int]) -> list[int]:
    """The tokens that end an answer: those that end generation, and a special one that opens any turn.

    Args:
        opening: the generation prompt. Its first token may be a plain word, which an answer may hold.
    """
    tokenizer = processor.tokenizer
    found = {int(token) for token in _end_tokens(directory) or [tokenizer.eos_token_id]}
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return sorted(found | (special & set(opening[:1])))


def _end_tokens(directory: Path) -> list[int]:
    genai = read_object(directory / "genai_config.json").get("model", {})
    end = {**genai, **read_object(directory / "generation_config.json")}.get("eos_token_id")
    return [] if end is None else [end] if isinstance(end, int) else list(end)
