"""The gate's settings in config.json, and the seal that keeps stock classes from loading the model without the gate."""

import functools
import json
import logging
from collections.abc import Callable
from typing import Any

SEAL = "guarded by SASA: load it with AutoModelForImageTextToText.from_pretrained(..., trust_remote_code=True)"
FORMATS = (3, 4)  # 3: of version 0.2, whose lane runs over all tokens. Other formats are refused
LONGEST_REFUSAL = 250  # tokens; the cache holds a token's place in the refusal, and bfloat16 counts to 256
NEEDED = ("threshold", "refusal", "refusal_token_ids", "generation_prompt_ids", "turn_token_ids", "graph")
# Settings that an operator may change: in config.json, or by from_pretrained(sasa={...}).
OPERATOR = ("threshold", "refusal", "gate", "prove", "begun_answers")
# Values of these settings, the default first. observe: judge and report, but refuse nothing. allow: `generate` accepts
# text behind the last generation prompt, unjudged; by default it raises an error.
CHOICES = {"gate": ("enforce", "observe"), "begun_answers": ("error", "allow")}
HOW_TO_LOAD = "Load the directory as sasa-export wrote it, or export it again."
UNKNOWN = "The gate of this guarded model has not judged what stands before this call. Start from the whole prompt"
logger = logging.getLogger("sasa")  # refusals are warnings, all other verdicts infos

# How far P(unsafe) of known prompts may move: any one of them before a warning, all on average before an error. On
# smol-llava, bfloat16 and 8 bits move each by at most 0.08, and 4 bits move one by 0.33 or more.
MOVED, MOVED_FAR = 0.1, 0.25


def check_settings(sasa: Any) -> dict[str, Any]:
    """Return config.sasa. Raise ValueError if the gate could not run on it."""
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
    """Return the refusal's token ids and the `end` of sequence. Raise ValueError on special ones, or the `image`."""
    ids = tokenizer.encode(refusal, add_special_tokens=False)
    marks = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    if {*marks, *tokenizer.all_special_ids, image} & set(ids):
        raise ValueError(f"the refusal {refusal!r} holds a special token of this model. Set a plain sentence.")
    return [*ids, end]


def follow_refusal(config: Any, directory: Any, **hub: Any) -> None:
    """Tokenize the refusal again if its text differs from the text that was tokenized last."""
    sasa = config.sasa
    if sasa["refusal"] == sasa.get("tokenized_refusal", sasa["refusal"]):
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, **hub)
    image = getattr(config, "image_token_id", None)
    ids = refusal_tokens(tokenizer, sasa["refusal"], sasa["refusal_token_ids"][-1], image)
    sasa |= {"refusal_token_ids": ids, "tokenized_refusal": sasa["refusal"]}
    check_settings(sasa)


def verdict_record(sasa: dict[str, Any], probability: float, held: bool, row: int, why: str = "") -> dict[str, Any]:
    """Return a verdict's log record, as arguments of `Logger.log`. `held` marks a refusal; NaN refuses too."""
    limit, would = sasa["threshold"], "would be " * (sasa.get("gate") == "observe")
    allows = probability < limit and not held
    level, what = (logging.INFO, "allowed") if allows else (logging.WARNING, f"{would}refused")
    said = {"probability": probability, "threshold": limit, "verdict": what, "row": row}  # for formatters
    return {"level": level, "msg": f"{what}{why}: P(unsafe) {probability:.4f}, threshold {limit:.4f}", "extra": said}


def recognised(sasa: dict[str, Any], judge: Callable[[list[int]], float], setting: str) -> str:
    """Return a warning if P(unsafe) of config.sasa's known prompts has moved, else an empty string. `judge` returns it
    for token ids. Raise ValueError if it moved far on average, unless `setting`, which names the way around this check,
    is empty. Without known prompts, or if the operator's `prove` is false, nothing is judged."""
    known = [] if sasa.get("prove") is False else sasa.get("known") or []
    if not known:
        return ""
    found = [judge([int(number) for number in entry["ids"].split()]) for entry in known]
    apart = [abs(now - entry["unsafe_probability"]) for now, entry in zip(found, known, strict=True)]
    apart = [value if value == value else 1.0 for value in apart]
    mean = sum(apart) / len(apart)
    what = f"P(unsafe) of known prompts has moved by up to {max(apart):.2f}, {mean:.2f} on average"
    why = "these are not the weights, or not in the precision, that the probe was fitted on"
    todo = "Fine-tune or quantize first, and patch the result"
    if setting and mean > MOVED_FAR:
        raise ValueError(f"{what}: {why}. {todo}. To load it all the same, {setting}.")
    return f"{what}: {why}. {todo}." if max(apart) > MOVED else ""


def require_proof(find_problem: Callable[[], str], sasa: dict[str, Any], host: Any, tried: tuple[str, ...]) -> None:
    """Raise RuntimeError if the gate does not hold on this version of the library `host`. `find_problem` tests it, and
    returns what fails. A version in `tried` is not tested; `prove` in config.sasa overrides this."""
    asked, name = sasa.get("prove"), host.__name__.replace("_", "-")
    if not (host.__version__ not in tried if asked is None else asked):
        return
    try:
        problem = find_problem()
    except Exception as error:  # for example where a name has changed
        problem = f"{type(error).__name__}: {error}"
    if problem:
        what = f"the gate of this guarded model does not hold on {name} {host.__version__} ({problem})"
        raise RuntimeError(f"{what}. Install one that it was tried on: pip install {name}=={tried[-1]}")


class GuardedConfig:
    """Mixin for a family's configuration. It opens the seal: an `id2label` that the stock class cannot read."""

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
    """Return a config.json with sealed nested configurations, so that stock classes and converters refuse it."""
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
    """Make a stock class raise ValueError when it is given a guarded configuration that is already opened."""
    init = stock.__init__
    if hasattr(init, "sealed_by_sasa"):
        return

    @functools.wraps(init)
    def sealed_init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        # An attribute marks it: after two directories of a family, the configuration's class is that of the first.
        if hasattr(config, "sasa") and not hasattr(self, "guarded_by_sasa"):
            raise ValueError(SEAL)
        init(self, config, *args, **kwargs)

    sealed_init.sealed_by_sasa = True  # type: ignore[attr-defined]
    stock.__init__ = sealed_init
