"""What a changed directory does when it is loaded, and that `verify` names the change."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import Guard
from records import note
from safetensors.torch import load_file, save_file
from test_fail_closed import HEAD, INDEX, TAMPERED, of_config, shard_of
from transformers import AutoModelForImageTextToText

from sasa_export.cli import main
from sasa_export.runtime.nodes import FORMAT

Guards = Callable[..., Guard]
IDS = torch.tensor([[1, 65, 70, 75, 80, 85]])  # (1, tokens)

pytestmark = pytest.mark.xdist_group("fail-closed")


def load(directory: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True).eval()


# Values of `sasa` that would do, were they those that were exported.
OTHERS: dict[str, Any] = {
    "format": FORMAT + 1, "safety_layer": 1, "semantic_layer": 5, "layers_from": "elsewhere", "epsilon": 1e-5,
    "threshold": 0.999999, "probe_space": "logits", "refusal": "Certainly!", "refusal_token_ids": [65, 2],
    "generation_prompt_ids": [70], "turn_token_ids": [70], "graph": [], "sha256": "0" * 64,
    "further_pairs": [[0, 3]], "probe_block": 4, "probe_positions": 2, "gate": "every-token",
}  # fmt: skip


@pytest.fixture(scope="module")
def settings(guard: Guards) -> dict[str, Any]:
    """The `sasa` entry that was exported."""
    config = json.loads((guard("llava").directory / "config.json").read_text())
    found: dict[str, Any] = config["sasa"]
    return found


def test_every_setting_is_bound(guard: Guards, settings: dict[str, Any], tmp_path: Path) -> None:
    """Each key of `sasa`, removed or of another value, is an error, be the value a possible one."""
    directory = Path(shutil.copytree(guard("llava").directory, tmp_path / "edited"))
    whole = (directory / "config.json").read_text()
    for key, value in settings.items():
        changes: list[Any] = [OTHERS.get(key, "another"), None, 0, -1, "", [], {}, True]
        edits: list[Callable[[dict[str, Any]], Any]] = [lambda sasa, key=key: sasa.pop(key)]  # type: ignore[misc]
        edits += [lambda sasa, new=new, key=key: sasa.update({key: new}) for new in changes if new != value]  # type: ignore[misc]
        said = set()
        for edit in edits:
            config = json.loads(whole)
            edit(config["sasa"])
            (directory / "config.json").write_text(json.dumps(config))
            with pytest.raises(ValueError, match=r"sasa|gate") as caught:
                load(directory)
            said.add(str(caught.value))
        note(
            "artefact", group="tampering", what=f"`sasa.{key}` removed, or another value", good=True, tried=len(edits),
            says=min(said, key=len),
        )  # fmt: skip
    (directory / "config.json").write_text(whole.replace('"sasa": {', '"sasa": {"more": 1,'))
    with pytest.raises(ValueError, match="sasa"):
        load(directory)


def swap(tiny_model: Callable[..., Path]) -> Callable[[Path], None]:
    """Replace the weights by those of another model of the same shapes."""
    other = tiny_model("llava", seed=1)

    def edit(directory: Path) -> None:
        shutil.copyfile(other / "model.safetensors", shard_of(directory, HEAD))

    return edit


def flip(directory: Path) -> None:
    """Change one byte in the middle of the weights."""
    path = shard_of(directory, HEAD)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def another_line(directory: Path) -> None:
    """A line more in the modeling file, which changes nothing."""
    path = directory / "modeling_sasa.py"
    path.write_text(path.read_text() + "\n# another line\n")


def another_probe(directory: Path) -> None:
    path = shard_of(directory, "sasa.probe.weight")
    tensors = {name: -tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def escape(directory: Path) -> None:
    """The index names a file outside the directory, which is there."""
    shard = shard_of(directory, HEAD)
    outside = directory.parent / f"{directory.name}-outside.safetensors"
    shutil.move(shard, outside)
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] = {
        key: f"../{outside.name}" if name == shard.name else name for key, name in index["weight_map"].items()
    }
    (directory / INDEX).write_text(json.dumps(index))


def link(directory: Path) -> None:
    """A shard is a link to the same bytes outside the directory."""
    shard = shard_of(directory, HEAD)
    outside = directory.parent / f"{directory.name}-linked.safetensors"
    shutil.move(shard, outside)
    shard.symlink_to(outside)


def other_config(directory: Path) -> None:
    of_config(lambda config: config["text_config"].update(rms_norm_eps=0.5))(directory)


# Changes that leave a directory in which a guarded model loads: only the checksums tell.
QUIET: dict[str, Callable[[Path], Any]] = {
    "one byte of the weights": flip,
    "a line more in modeling_sasa.py": another_line,
    "another probe": another_probe,
    "an index that leads out of the directory": escape,
    "a link that leads out of the directory": link,
    "another value outside `sasa`": other_config,
    "a file more": lambda directory: (directory / "notes.txt").write_text("more"),
    "a pickle beside the weights": lambda directory: torch.save({}, directory / "pytorch_model.bin"),
    "an adapter beside the weights": lambda directory: (directory / "adapter_config.json").write_text("{}"),
}


def verified(directory: Path) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["verify", str(directory), "--files"])
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result.exit_code, result.stderr


@pytest.mark.parametrize("name", ["weights of another model of the same shapes", *QUIET])
def test_verify_names_a_quiet_change(guard: Guards, tiny_model: Callable[..., Path], tmp_path: Path, name: str) -> None:
    """What loads in spite of a change is guarded all the same, and `verify` finds the file."""
    directory = Path(shutil.copytree(guard("llava").directory, tmp_path / "changed"))
    assert verified(directory)[0] == 0
    {**QUIET, "weights of another model of the same shapes": swap(tiny_model)}[name](directory)
    if name != "an adapter beside the weights":  # peft stops at an empty one
        with torch.no_grad():
            assert load(directory)(input_ids=IDS).unsafe_probability is not None
    code, said = verified(directory)
    line = next(line for line in said.splitlines() if "✗" in line)
    note("artefact", group="verify", what=name, good=code == 1, tried=1, says=line.strip().replace(str(tmp_path), ""))
    assert code == 1, said


def test_verify_finds_whatever_was_tampered_with(guard: Guards, tmp_path: Path) -> None:
    for name, edit in TAMPERED.items():
        directory = Path(shutil.copytree(guard("llava").directory, tmp_path / name.replace("/", " ")))
        edit(directory)
        code, said = verified(directory)
        assert code == 1 and ("✗" in said or "Error:" in said), (name, said)
    note(
        "artefact", group="verify", what="everything of the table above", good=True, tried=len(TAMPERED),
        says="exit code 1",
    )  # fmt: skip
