"""Load a source: its stock model and processor, or the bare skeleton that tracing needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sasa_export.errors import OpenError
from sasa_export.open import Source


@dataclass(frozen=True)
class Sizes:
    """The decoder's number of blocks, hidden size and vocabulary, and the soft cap on its logits if it has one."""

    blocks: int
    hidden: int
    vocabulary: int
    softcap: float | None


def stock_config(source: Source) -> Any:
    """The source's configuration as its stock class reads it, defaults filled in. OpenError where it cannot."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.directory)
    except Exception as error:  # a damaged configuration fails in as many ways as there are fields
        raise OpenError(f"the config.json of {source.name} is damaged ({_first_line(error)}). Restore it.") from None


def stock_classes(source: Source) -> tuple[type, type]:
    """The stock configuration class and ...ForConditionalGeneration class of a source."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    config_class = type(stock_config(source))
    return config_class, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config_class]


def read_sizes(source: Source) -> Sizes:
    """Read from the configuration class, since a config.json leaves out what is usual."""
    text = stock_config(source).get_text_config(decoder=True)
    return Sizes(
        int(text.num_hidden_layers),
        int(text.hidden_size),
        int(text.vocab_size),
        getattr(text, "final_logit_softcapping", None),
    )


def load_model(source: Source, *, dtype: str, device: str) -> Any:
    """The stock model, evaluated, on `device`. OpenError where weights are missing, unexpected or NaN."""
    import torch
    from transformers import AutoModelForImageTextToText

    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            source.directory, dtype=_dtype(dtype), device_map=device, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise OpenError(f"{source.name} could not be loaded ({_first_line(error)}).") from None
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            first = sorted(str(key) for key in info[problem])[0]
            raise OpenError(
                f"{source.name} has {len(info[problem])} {problem.replace('_', ' ')} ({first}). "
                "The files do not belong together: restore them from their source."
            )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise OpenError(f"{source.name} has NaN or infinity in {name}. Restore the weights from their source.")
    return model.eval()


def load_processor(source: Source) -> Any:
    """The stock processor, padding on the left, as generation wants it."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(source.directory)
    except (OSError, ValueError, ImportError) as error:
        raise OpenError(f"{source.name} has no usable processor ({_first_line(error)}).") from None
    if not hasattr(processor, "image_processor") or getattr(processor, "chat_template", None) is None:
        raise OpenError(f"{source.name} has no image processor or no chat template, so its prompts cannot be written.")
    processor.tokenizer.padding_side = "left"
    return processor


@contextmanager
def skeleton(source: Source) -> Iterator[Any]:
    """The stock model with fake weights: shapes alone, no memory. Runs only within the context."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers.initialization import no_init_weights

    _, model_class = stock_classes(source)
    config = stock_config(source)
    with FakeTensorMode():
        try:
            with no_init_weights():
                model = model_class(config).eval()
        except Exception as error:  # sizes that contradict each other fail wherever they meet first
            raise OpenError(f"the config.json of {source.name} describes no model ({_first_line(error)}).") from None
        _check_names(source, model)
        yield model


def _check_names(source: Source, model: Any) -> None:
    """Raise OpenError where the shards lack a tensor that the model needs; names are mapped as on loading."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    transforms = get_model_conversion_mapping(model)
    held = set()
    for shard in source.shards:
        for name in shard.keys:
            for transform in transforms:
                name, _ = transform.rename_source_key(name)
            held.add(name)
    tied = model.all_tied_weights_keys
    missing = sorted(
        name for name, _ in model.named_parameters() if name not in held and tied.get(name, name) not in held
    )
    if missing:
        raise OpenError(
            f"the shards of {source.name} lack {len(missing)} tensors of the model ({missing[0]}). "
            "Restore the files from their source."
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)
