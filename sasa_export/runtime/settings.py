"""config.json["sasa"]: what the gate runs on. `threshold` and `refusal` are the operator's to change."""

from typing import Any

FORMAT = 3  # a directory of another format is refused
LONGEST_REFUSAL = 250  # tokens; the cache counts how far the refusal is, and bfloat16 counts to 256
OPERATIONS = ("tap", "projection", "lane_block", "lane_norm", "lane_head", "probe", "gate")  # what SASA adds
NEEDED = ("threshold", "refusal", "refusal_token_ids", "generation_prompt_ids", "turn_token_ids", "graph")
HOW_TO_LOAD = "Load the directory as sasa-export wrote it, or export it again."


def check_settings(sasa: Any) -> dict[str, Any]:
    """Return config.sasa, or raise ValueError where the gate could not run on it."""
    if not isinstance(sasa, dict) or any(name not in sasa for name in NEEDED):
        raise ValueError(f"config.json has no complete `sasa` entry, so there is no gate. {HOW_TO_LOAD}")
    if sasa.get("format") != FORMAT:
        raise ValueError(f"config.sasa has format {sasa.get('format')}, this file reads {FORMAT}. {HOW_TO_LOAD}")
    threshold, ids = sasa["threshold"], sasa["refusal_token_ids"]
    if not isinstance(threshold, float) or not 0.0 < threshold < 1.0:
        raise ValueError(f"config.sasa has the threshold {threshold!r}. Set a number between 0 and 1.")
    if not isinstance(sasa["refusal"], str) or not sasa["refusal"].strip() or not ids:
        raise ValueError("config.sasa has no refusal. Set the sentence that the model should say.")
    if len(ids) > LONGEST_REFUSAL:
        raise ValueError(f"the refusal has {len(ids)} tokens, and at most {LONGEST_REFUSAL} fit. Set a shorter one.")
    operations = [node["op"] for node in sasa["graph"]]
    if "tap" not in operations or operations[-2:] != ["probe", "gate"]:
        raise ValueError(f"config.sasa's graph does not end in a probe and a gate. {HOW_TO_LOAD}")
    return sasa


def follow_refusal(sasa: dict[str, Any], directory: Any) -> None:
    """Tokenize the refusal anew where its text is another than the one that was tokenized last."""
    if sasa["refusal"] == sasa.get("tokenized_refusal", sasa["refusal"]):
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer.encode(sasa["refusal"], add_special_tokens=False)
    if set(ids) & set(tokenizer.all_special_ids):
        raise ValueError("the refusal in config.sasa holds a special token. Set a plain sentence.")
    sasa |= {"refusal_token_ids": [*ids, sasa["refusal_token_ids"][-1]], "tokenized_refusal": sasa["refusal"]}
    check_settings(sasa)
