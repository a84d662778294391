"""What `pip install` brings: the wheel alone, in an environment outside the clone, patches a model."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from cli_steps import offline

ROOT = Path(__file__).parents[2]
MOST_BYTES = 45_000_000  # of which the vision tower of smol-llava is 34 MB


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(out)]
    subprocess.run([*command, str(ROOT)], check=True)
    (found,) = out.glob("*.whl")
    return found


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_beside_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"sasa_export"}
    assert wheel.stat().st_size < MOST_BYTES
    assert "sasa_export/graphs/llava.toml" in names and not any("heldout" in name for name in names)


@pytest.mark.slow
def test_the_wheel_patches_a_model_outside_the_clone(wheel: Path, llava: Path, probe: Path, tmp_path: Path) -> None:
    """Its dependencies are those of this environment, sasa_export is that of the wheel."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    (packages,) = environment.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    # Behind the wheel's own place, so that an editable install in this environment does not come first.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    python = environment / "bin" / "python"
    place = ["-c", "import sasa_export; print(sasa_export.__file__)"]
    found = subprocess.run([python, *place], cwd=tmp_path, capture_output=True, text=True, check=True, env=offline())
    assert Path(found.stdout.strip()).is_relative_to(packages)
    command = [*map(str, (python, "-m", "sasa_export", "--model", llava, "--out", "patched", "--probe", probe))]
    subprocess.run(command, cwd=tmp_path, check=True, env=offline())
    assert (tmp_path / "patched" / "config.json").exists()
