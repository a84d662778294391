"""A directory of ONNX graphs: what lies in it by the layout of onnxruntime-genai, of transformers.js, or of optimum."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sasa_export.errors import OpenError
from sasa_export.models import Source
from sasa_export.models.contents import read_object
from sasa_export.models.family import Family, families, family_of
from sasa_export.models.shards import Shard

GENAI = "genai_config.json"
ROLES = {
    "decoder": ("decoder_model_merged", "decoder_model", "model"),
    "embedding": ("embed_tokens",),
    "vision": ("vision_encoder",),
}
PLACES = ("", "onnx/")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # what configurations call the number of blocks
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


@dataclass(frozen=True)
class Graphs:
    """An opened directory: `files` are its graphs by role (decoder, embedding, vision), and `weights` what lies beside
    them, both relative to the directory."""

    source: Source
    files: dict[str, str]
    weights: tuple[str, ...]

    @property
    def decoder(self) -> Path:
        return self.source.directory / self.files["decoder"]

    def size(self, *names: str) -> int | None:
        """The first of these numbers that the decoder's configuration names."""
        return next((found[name] for found in _texts(self.source.directory) for name in names if found.get(name)), None)


def holds_graphs(model: str) -> bool:
    """Is this a directory of ONNX graphs, with no weights for transformers in it?"""
    directory = Path(model)
    return not any(directory.glob("*.safetensors")) and any(_candidates(directory, "decoder"))


def open_graphs(model: str, chosen: Sequence[str] = ()) -> Graphs:
    """Find the graphs of a directory, of which `chosen` names variants: by file, or by what a name ends with.

    Raises OpenError, which names the file, where one is missing, or it is not clear which of several is meant.
    """
    directory = Path(model)
    config = read_object(directory / "config.json")
    if "sasa" in config:
        raise OpenError(f"{model} is a patched model already. Give the model that it was made from.")
    if not any((directory / name).exists() for name in TOKENIZERS):
        raise OpenError(
            f"{model} has no tokenizer ({TOKENIZERS[0]}), so no prompt can be written. Put its files there."
        )
    genai = read_object(directory / GENAI).get("model", {})
    files = _of_genai(directory, genai) if genai else _by_names(directory, chosen)
    model_type = config.get("model_type") or genai.get("type")
    if model_type is None:
        raise OpenError(f"{model} has neither a config.json with a model_type nor a {GENAI}. Put one there.")
    weights = tuple(sorted({name for file in files.values() for name in _beside(directory, file)}))
    shards = tuple(Shard(directory / name, (), (), ()) for name in (*files.values(), *weights))
    source = Source(model, directory, {"model_type": model_type, **config}, _family(model_type), shards)
    return Graphs(source, files, weights)


def _family(model_type: str) -> Family:
    """The family of a type, which is one of its own where none is known, as of decoders of text."""
    known = any(model_type in family.model_types for family in families().values())
    return family_of(model_type) if known else Family(model_type, (model_type,))


def _texts(directory: Path) -> Iterator[dict[str, Any]]:
    """Where sizes of the decoder may stand."""
    config = read_object(directory / "config.json")
    yield from (config.get("text_config") or {}, config)
    yield read_object(directory / GENAI).get("model", {}).get("decoder", {})


def _of_genai(directory: Path, model: dict[str, Any]) -> dict[str, str]:
    """The graphs that onnxruntime-genai's configuration names."""
    named = {role: model[role].get("filename") for role in ROLES if isinstance(model.get(role), dict)}
    others = [role for role in ("speech", "encoder") if role in model]
    if others or not named.get("decoder"):
        what = f"a part called {others[0]}" if others else "no decoder of one file"
        raise OpenError(f"{directory / GENAI} has {what}, which cannot be guarded. Use another model.")
    missing = [name for name in named.values() if not (directory / str(name)).is_file()]
    if missing:
        raise OpenError(f"{directory / str(missing[0])} is missing, which {GENAI} names. Restore the file.")
    return {role: str(name) for role, name in named.items()}


def _by_names(directory: Path, chosen: Sequence[str]) -> dict[str, str]:
    """The graphs by their usual names."""
    unknown = [
        name
        for name in chosen
        if not any(_meant(file, name) for role in ROLES for file in _candidates(directory, role))
    ]
    if unknown:
        there = ", ".join(file for role in ROLES for file in _candidates(directory, role))
        raise OpenError(f"--onnx-file {unknown[0]} is none of the graphs of {directory}: {there}.")
    files: dict[str, str] = {}
    for role in ROLES:
        there = _candidates(directory, role)
        wanted = [file for file in there if any(_meant(file, name) for name in chosen)]
        if len(wanted) != 1 and "decoder" in files:  # that of the decoder's type
            wanted = [file for file in wanted or there if variant(file) == variant(files["decoder"])] or wanted
        found = wanted or there
        if len(found) > 1:
            raise OpenError(f"{directory} has several graphs of one kind: {', '.join(found)}. Choose with --onnx-file.")
        if found:
            files[role] = found[0]
    if "decoder" not in files:
        raise OpenError(f"{directory} has no decoder ({', '.join(ROLES['decoder'])}, .onnx). Check the path.")
    return files


def _candidates(directory: Path, role: str) -> list[str]:
    """Files of one role: those of the first name that there are any of."""
    for name in ROLES[role]:
        found = [
            f"{place}{path.name}"
            for place in PLACES
            for path in sorted((directory / place).glob(f"{name}*.onnx"))
            if re.fullmatch(rf"{name}(_[a-z0-9]+)?", path.stem)
        ]
        if found:
            return found
    return []


def variant(file: str) -> str:
    """What marks a graph's type behind its name, such as q4; empty where nothing does."""
    stem = Path(file).stem
    name = next(name for names in ROLES.values() for name in names if stem.startswith(name))
    return stem.removeprefix(name).removeprefix("_")


def _meant(file: str, name: str) -> bool:
    return name in (file, Path(file).name, variant(file) or "fp32")


def _beside(directory: Path, file: str) -> Iterator[str]:
    """The files in which a graph has its weights. OpenError where one is missing, or the graph is damaged."""
    import onnx_ir as ir  # a lean installation has none

    path = directory / file
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf's, the file system's, and those of the graph's reader
        raise OpenError(f"{path} is not a valid graph ({type(error).__name__}). Restore the file.") from None
    stored = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    for location in sorted({str(tensor.location) for tensor in stored if isinstance(tensor, ir.ExternalTensor)}):
        name = (Path(file).parent / location).as_posix()
        if ".." in Path(location).parts or not (directory / name).is_file():
            raise OpenError(f"{directory / name} is missing, where {file} has its weights. Restore the file.")
        yield name
