"""Writes config.json of a patched model: an own model type, seals against stock classes, and all settings of SASA."""

import json
from pathlib import Path
from typing import Any

from sasa_export.errors import EmitError
from sasa_export.gate import GateSpec
from sasa_export.models import Source
from sasa_export.models.contents import read_object
from sasa_export.models.load import stock_classes
from sasa_export.models.quantized import scheme
from sasa_export.runtime.bundle import MLX_FILE, MODELING_FILE, guarded_type, mlx_source, modeling_source
from sasa_export.runtime.settings import LONGEST_REFUSAL, refusal_tokens, sealed

THINKING = ("enable_thinking", "thinking")  # options of chat templates: Qwen and GLM, Kimi


def gate_of(source: Source, processor: Any, refusal: str) -> dict[str, Any]:
    """Return the fields of `GateSpec` that come from a model's tokenizer and chat template."""
    opening = generation_prompt_ids(processor)
    return {
        "refusal": refusal,
        "tokenized_refusal": refusal,
        "refusal_token_ids": refusal_ids(processor, source.directory, refusal),
        "generation_prompt_ids": opening,
        "other_generation_prompt_ids": other_generation_prompts(processor, opening),
        "turn_token_ids": turn_token_ids(processor, source.directory, opening),
    }


def write_config(source: Source, gate: GateSpec, directory: Path) -> None:
    """Write config.json and the modeling files that it names. Families that mlx-vlm runs get a file for it, too."""
    config_class, model_class = stock_classes(source)
    module = MODELING_FILE.removesuffix(".py")
    config = dict(source.config)
    config["model_type"] = guarded_type(source.config["model_type"])
    config["architectures"] = [f"Sasa{model_class.__name__}"]
    config["auto_map"] = {
        "AutoConfig": f"{module}.Sasa{config_class.__name__}",
        "AutoModelForImageTextToText": f"{module}.Sasa{model_class.__name__}",
        "AutoModelForMultimodalLM": f"{module}.Sasa{model_class.__name__}",  # what `transformers serve` loads
    }
    config["sasa"] = gate.to_json()
    if source.config["model_type"] in source.family.mlx and scheme(source.config) is None:
        config["model_file"] = MLX_FILE
        (directory / MLX_FILE).write_text(mlx_source(), encoding="utf-8")
    (directory / "config.json").write_text(config_text(sealed(config)), encoding="utf-8")
    (directory / MODELING_FILE).write_text(modeling_source(config_class, model_class), encoding="utf-8")


def config_text(config: dict[str, Any]) -> str:
    """Return the text of config.json."""
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def refusal_ids(processor: Any, directory: Path, refusal: str) -> list[int]:
    """Return the refusal as token ids, with the end of sequence last. Raise EmitError where it cannot be used."""
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
    """Return the token ids with which the chat template, given its options, opens the answer, if it opens one."""
    chat = [{"role": "user", "content": [{"type": "text", "text": "a question"}]}]
    with_prompt = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, **options)
    without = processor.apply_chat_template(chat, add_generation_prompt=False, tokenize=False, **options)
    if not with_prompt.startswith(without):
        return []
    tokenizer = processor.tokenizer
    whole = tokenizer.encode(with_prompt, add_special_tokens=False)
    alone = tokenizer.encode(with_prompt[len(without) :], add_special_tokens=False)
    shared = 0  # a tokenizer may join the first piece with the text before it
    while shared < min(len(whole), len(alone)) and whole[-1 - shared] == alone[-1 - shared]:
        shared += 1
    return [int(token) for token in alone[len(alone) - shared :]]


def other_generation_prompts(processor: Any, opening: list[int]) -> list[list[int]]:
    """Return the generation prompts with thinking turned on or off that differ from the default, `opening`."""
    found: list[list[int]] = []
    for options in ({name: on} for name in THINKING for on in (True, False)):
        ids = generation_prompt_ids(processor, **options)
        if ids and ids not in (opening, *found):
            found.append(ids)
    return found


def turn_token_ids(processor: Any, directory: Path, opening: list[int]) -> list[int]:
    """Return the tokens that end an answer: the tokens that end generation, and a special token that opens a turn.

    Args:
        opening: the generation prompt. Its first token may be a plain word, which an answer may contain.
    """
    tokenizer = processor.tokenizer
    found = {int(token) for token in _end_tokens(directory) or [tokenizer.eos_token_id]}
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return sorted(found | (special & set(opening[:1])))


def _end_tokens(directory: Path) -> list[int]:
    genai = read_object(directory / "genai_config.json").get("model", {})
    end = {**genai, **read_object(directory / "generation_config.json")}.get("eos_token_id")
    return [] if end is None else [end] if isinstance(end, int) else list(end)
