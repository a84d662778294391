"""Opens a directory of ONNX graphs in the layout of onnxruntime-genai, transformers.js or optimum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from sasa_export.errors import OpenError
from sasa_export.models import Source
from sasa_export.models.contents import read_object
from sasa_export.models.family import Family, families, family_of
from sasa_export.models.shards import Shard

GENAI = "genai_config.json"
ROLES = {
    "decoder": ("decoder_model_merged", "decoder_model", "model"), "embedding": ("embed_tokens",),
    "vision": ("vision_encoder",),
}  # fmt: skip
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # names of the number of blocks
COPIED = ("*.json", "*.jinja", "*.txt", "*.model")  # files that a patched directory needs beside the graphs
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Graphs:
    """An opened directory. `files` holds its graphs by role (decoder, embedding, vision), and `weights` the files of
    their weights. Both are relative to the directory."""

    source: Source
    files: dict[str, str]
    weights: tuple[str, ...]

    @property
    def decoder(self) -> Path:
        return self.source.directory / self.files["decoder"]

    def size(self, *names: str) -> int | None:
        """Return the first number under one of these names in the decoder's configuration, or None."""
        genai = read_object(self.source.directory / GENAI).get("model", {}).get("decoder", {})
        texts = (self.source.config.get("text_config") or {}, self.source.config, genai)
        return next((text[name] for text in texts for name in names if text.get(name)), None)


def holds_graphs(model: str) -> bool:
    """Return whether this is a directory of ONNX graphs without weights for transformers."""
    weights = [path for path in Path(model).glob("*.safetensors") if not path.name.startswith("sasa-")]
    return not weights and bool(_candidates(Path(model), "decoder"))


def open_graphs(model: str, chosen: Sequence[str] = ()) -> Graphs:
    """Open a directory of graphs. `chosen` selects variants by their file, or by the ending of the file's name.

    Raises OpenError, which names the file, where a file is missing, or several variants are possible.
    """
    directory = Path(model)
    config, genai = read_object(directory / "config.json"), read_object(directory / GENAI).get("model", {})
    if "sasa" in config:
        raise OpenError(f"{model} is a patched model already. Give the model that it was made from.")
    if not any((directory / name).exists() for name in TOKENIZERS):
        raise OpenError(
            f"{model} has no tokenizer ({TOKENIZERS[0]}), so no prompt can be written. Put its files there."
        )
    model_type = config.get("model_type") or genai.get("type")
    if model_type is None:
        raise OpenError(f"{model} has neither a config.json with a model_type nor a {GENAI}. Put one there.")
    files = _of_genai(directory, genai) if genai else _by_names(directory, chosen)
    weights = tuple(sorted({name for file in files.values() for name in _beside(directory, file)}))
    shards = tuple(Shard(directory / name, (), (), ()) for name in (*files.values(), *weights))
    known = any(model_type in family.model_types for family in families().values())
    family = family_of(model_type) if known else Family(model_type, (model_type,))  # such as text-only models
    family = replace(family, files=COPIED)
    return Graphs(Source(model, directory, {"model_type": model_type, **config}, family, shards), files, weights)


def _of_genai(directory: Path, model: dict[str, Any]) -> dict[str, str]:
    """Return the graphs that onnxruntime-genai's configuration names, by role."""
    files = {role: str(model[role].get("filename")) for role in ROLES if isinstance(model.get(role), dict)}
    others = [role for role in ("speech", "encoder") if role in model]
    if others or "decoder" not in files:
        raise OpenError(f"{directory / GENAI} has {others[0] if others else 'no decoder'}. Use another model.")
    missing = [name for name in files.values() if not (directory / name).is_file()]
    if missing:
        raise OpenError(f"{directory / missing[0]} is missing, which {GENAI} names. Restore the file.")
    return files


def _by_names(directory: Path, chosen: Sequence[str]) -> dict[str, str]:
    """Return the graphs with the usual names, by role. By default, all have the decoder's variant."""
    files, unknown = dict[str, str](), set(chosen)
    there = {role: _candidates(directory, role) for role in ROLES}
    for role, found in there.items():
        names = {file: {file, Path(file).name, variant(file) or "fp32"} for file in found}
        meant = [file for file in found if names[file] & set(chosen)]
        if len(meant) != 1:
            meant = meant or found
            meant = [file for file in meant if files and variant(file) == variant(files["decoder"])] or meant
        if len(meant) > 1:
            raise OpenError(f"{directory} has {', '.join(meant)}: choose one of them with --onnx-file.")
        if meant:
            files[role] = meant[0]
            unknown -= names[meant[0]]
        elif role == "decoder":
            raise OpenError(f"{directory} has no decoder ({', '.join(ROLES['decoder'])}, .onnx). Check the path.")
    if unknown:
        what = f"none of the graphs of {directory}, or not the only one"
        raise OpenError(f"--onnx-file {min(unknown)} is {what}: {', '.join(chain(*there.values()))}.")
    return files


def _candidates(directory: Path, role: str) -> list[str]:
    """Return the files of one role, under the first of the role's names that has any."""
    for name in ROLES[role]:
        paths = sorted([*directory.glob(f"{name}*.onnx"), *directory.glob(f"onnx/{name}*.onnx")])
        found = [path for path in paths if path.stem == name or path.stem.startswith(f"{name}_")]
        if found:
            return [path.relative_to(directory).as_posix() for path in found]
    return []


def variant(file: str) -> str:
    """Return the ending of a graph's name that marks its type, such as q4. It may be empty."""
    stem = Path(file).stem
    name = next((name for names in ROLES.values() for name in names if stem.startswith(name)), stem)
    return stem.removeprefix(name).removeprefix("_")


def _beside(directory: Path, file: str) -> Iterator[str]:
    """Yield the files of a graph's weights. Raises OpenError where one is missing, or the graph is damaged."""
    import onnx_ir as ir  # a lean installation has none

    try:
        model = ir.load(directory / file)
    except Exception as error:  # from protobuf, the file system or the graph's reader
        raise OpenError(f"{directory / file} is no graph ({type(error).__name__}). Restore the file.") from None
    stored = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    for location in sorted({str(tensor.location) for tensor in stored if isinstance(tensor, ir.ExternalTensor)}):
        name = (Path(file).parent / location).as_posix()
        if ".." in Path(location).parts or not (directory / name).is_file():
            raise OpenError(f"{directory / name} is missing, where {file} has its weights. Restore the file.")
        yield name
