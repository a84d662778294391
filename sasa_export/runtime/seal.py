"""The seal that keeps stock classes from loading a guarded model without its gate."""

import json
from typing import Any

from sasa_export.runtime.settings import check_settings, fingerprint

SEAL = "guarded by SASA: load it with AutoModelForImageTextToText.from_pretrained(..., trust_remote_code=True)"


class GuardedConfig:
    """Mixed into a family's configuration: it opens the seal on which the stock configuration breaks.

    The sealed `id2label` of each nested configuration carries the message; a stock class cannot read it, so
    it can never load the weights without the gate.
    """

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        config_dict = {key: _opened(value) for key, value in config_dict.items()}
        config_dict = {key: value for key, value in config_dict.items() if value != {}}
        sasa = check_settings(config_dict.get("sasa"))
        if sasa.get("sha256") != fingerprint(sasa):
            raise ValueError(
                "config.sasa was edited since it was written, so the gate may not be what was verified. "
                "Export the model again with the settings that you want; --probe keeps its probe."
            )
        return super().from_dict(config_dict, **kwargs)

    def to_json_string(self, *args: Any, **kwargs: Any) -> str:
        written = json.loads(super().to_json_string(*args, **kwargs))
        if isinstance(written.get("sasa"), dict):
            written["sasa"]["sha256"] = fingerprint(written["sasa"])
        return json.dumps(sealed(written), indent=2, sort_keys=True) + "\n"


def sealed(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Seal the nested configurations of a config.json, so that stock classes refuse it.

    They lose their architectures, by which a converter would take the decoder for a plain one.
    """
    out = dict(config_dict)
    for name in ("text_config", "vision_config"):
        nested = {key: value for key, value in out.get(name, {}).items() if key != "architectures"}
        out[name] = {**nested, "id2label": {SEAL: 0}}
    return out


def _opened(value: Any) -> Any:
    if isinstance(value, dict) and SEAL in (value.get("id2label") or {}):
        return {key: item for key, item in value.items() if key != "id2label"}
    return value
