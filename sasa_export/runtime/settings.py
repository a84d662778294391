"""config.json: what the gate runs on, and the seal that keeps stock classes from loading the model without it."""

import functools
import json
from typing import Any

SEAL = "guarded by SASA: load it with AutoModelForImageTextToText.from_pretrained(..., trust_remote_code=True)"
FORMATS = (3, 4)  # 3: of 0.2, whose lane runs over all tokens. A directory of another format is refused
LONGEST_REFUSAL = 250  # tokens; the cache counts how far the refusal is, and bfloat16 counts to 256
NEEDED = ("threshold", "refusal", "refusal_token_ids", "generation_prompt_ids", "turn_token_ids", "graph")
# The operator's to change: there, or from_pretrained(sasa={...}).
OPERATOR = ("threshold", "refusal", "gate", "prove", "begun_answers")
# What these may be, the default first. observe: judge and report, and refuse nothing. allow: text that `generate` gets
# behind the last generation prompt is not judged, and else an error.
CHOICES = {"gate": ("enforce", "observe"), "begun_answers": ("error", "allow")}
HOW_TO_LOAD = "Load the directory as sasa-export wrote it, or export it again."


def check_settings(sasa: Any) -> dict[str, Any]:
    """Return config.sasa, or raise ValueError where the gate could not run on it."""
    if not isinstance(sasa, dict) or any(name not in sasa for name in NEEDED) or sasa.get("format") not in FORMATS:
        raise ValueError(f"config.json has no complete `sasa` entry of format {FORMATS[-1]}, so no gate. {HOW_TO_LOAD}")
    threshold, ids = sasa["threshold"], sasa["refusal_token_ids"]
    if not isinstance(threshold, float) or not 0.0 < threshold < 1.0:
        raise ValueError(f"config.sasa has the threshold {threshold!r}. Set a number between 0 and 1.")
    if not str(sasa["refusal"]).strip() or not 0 < len(ids) <= LONGEST_REFUSAL:
        raise ValueError(f"config.sasa's refusal is empty, or has more than {LONGEST_REFUSAL} tokens. Set another one.")
    for name, values in CHOICES.items():
        if sasa.get(name, values[0]) not in values:
            raise ValueError(f"config.sasa has the {name} {sasa[name]!r}. Set one of: {', '.join(values)}.")
    if sasa.get("prove") not in (None, True, False):
        raise ValueError(f"config.sasa has prove: {sasa['prove']!r}. Set true, false or nothing.")
    operations = [node["op"] for node in sasa["graph"]]
    if "tap" not in operations or operations[-2:] != ["probe", "gate"]:
        raise ValueError(f"config.sasa's graph does not end in a probe and a gate. {HOW_TO_LOAD}")
    return sasa


def refusal_tokens(tokenizer: Any, refusal: str, end: int, image: Any = None) -> list[int]:
    """The refusal as token ids, the `end` of sequence last. ValueError where one is no text, like the `image`."""
    ids = tokenizer.encode(refusal, add_special_tokens=False)
    marks = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    if {*marks, *tokenizer.all_special_ids, image} & set(ids):
        raise ValueError(f"the refusal {refusal!r} holds a special token of this model. Set a plain sentence.")
    return [*ids, end]


def follow_refusal(config: Any, directory: Any, **hub: Any) -> None:
    """Tokenize the refusal anew where its text is another than the one that was tokenized last."""
    sasa = config.sasa
    if sasa["refusal"] == sasa.get("tokenized_refusal", sasa["refusal"]):
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, **hub)
    image = getattr(config, "image_token_id", None)
    ids = refusal_tokens(tokenizer, sasa["refusal"], sasa["refusal_token_ids"][-1], image)
    sasa |= {"refusal_token_ids": ids, "tokenized_refusal": sasa["refusal"]}
    check_settings(sasa)


class GuardedConfig:
    """Mixed into a family's configuration: it opens the seal, an `id2label` that the stock one cannot read."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        opened = {key: _opened(value) for key, value in config_dict.items()}
        config_dict = {key: value for key, value in opened.items() if value != {}}
        sasa, changes = check_settings(config_dict.get("sasa")), kwargs.pop("sasa", {})
        if not isinstance(changes, dict) or set(changes) - set(OPERATOR):
            raise ValueError(f"sasa={changes!r}: only {', '.join(OPERATOR)} can be changed at load.")
        config_dict["sasa"] = check_settings({**sasa, **changes})
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    def to_json_string(self, *args: Any, **kwargs: Any) -> str:
        written = json.loads(super().to_json_string(*args, **kwargs))  # type: ignore[misc]
        return json.dumps(sealed(written), indent=2, sort_keys=True) + "\n"


def sealed(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Seal the nested configurations of a config.json, so that stock classes and converters refuse it."""
    out = dict(config_dict)
    for name in ("text_config", "vision_config"):
        nested = {key: value for key, value in out.get(name, {}).items() if key != "architectures"}
        out[name] = {**nested, "id2label": {SEAL: 0}}
    return out


def _opened(value: Any) -> Any:
    if isinstance(value, dict) and SEAL in (value.get("id2label") or {}):
        return {key: item for key, item in value.items() if key != "id2label"}
    return value


def refuse_guarded_configurations(stock: Any) -> None:
    """Let a stock class raise ValueError where it is handed a guarded configuration that is opened already."""
    init = stock.__init__
    if hasattr(init, "sealed_by_sasa"):
        return

    @functools.wraps(init)
    def sealed_init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        # By an attribute: after two directories of a family, the configuration's class is the first one's.
        if hasattr(config, "sasa") and not hasattr(self, "guarded_by_sasa"):
            raise ValueError(SEAL)
        init(self, config, *args, **kwargs)

    sealed_init.sealed_by_sasa = True  # type: ignore[attr-defined]
    stock.__init__ = sealed_init
