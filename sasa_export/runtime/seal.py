"""The seal that keeps stock classes from loading a guarded model without its gate."""

import functools
import json
from typing import Any

from sasa_export.runtime.settings import check_settings

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
        check_settings(config_dict.get("sasa"))
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    def to_json_string(self, *args: Any, **kwargs: Any) -> str:
        written = json.loads(super().to_json_string(*args, **kwargs))  # type: ignore[misc]
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
