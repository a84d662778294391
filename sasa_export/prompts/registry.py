"""Load data sets by spec: `name:PATH,option=value,option=value+value`, or a bare path.

A bare path is a table if its suffix is in `TABLES`, and otherwise a JSONL file.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from zlib import crc32

from sasa_export.errors import DataError
from sasa_export.prompts.builtin_sets import builtin, builtin_evaluation, under_a_carrier
from sasa_export.prompts.data_sets import DATA_SETS, Chosen
from sasa_export.prompts.leak import grouped
from sasa_export.prompts.prompt import Prompt
from sasa_export.prompts.read import TABLES, folded
from sasa_export.prompts.render import GRID, fits
from sasa_export.report import Silent

# A single letter before a colon is a Windows drive. Options come last, so that a path may contain commas.
SPEC = re.compile(r"(?:([A-Za-z0-9_-]{2,}):)?(.*?)((?:,[a-z_]+=[^,/\\]*)*)", re.DOTALL)
BUILTIN, CALIBRATION = "builtin", "--calibration"
QUIET = Silent()
LEAST = 5  # prompts of each label that a probe needs
EXAMPLES = {  # data sets to suggest, by missing label
    1: "figstep:DIR or mm-safetybench:DIR",
    0: "xstest:FILE,subset=safe (text) or vlguard:DIR,subset=safe_safes (pictures)",
}


def load(spec: str, flag: str = "--data", report: Silent = QUIET, *, labelled: bool = True) -> list[Prompt]:
    """Return the prompts of one data set, in its order.

    Args:
        spec: a spec as in the module's docstring, or `builtin` for the flag's built-in set.
        flag: the command-line flag that carried the spec.
        labelled: whether the user's own data needs labels. If not, all get label 0.

    Raises DataError, naming the file and the faulty record, or the unreadable picture.
    """
    if spec == BUILTIN:
        return builtin() if flag == CALIBRATION else builtin_evaluation()
    name, path, chosen = parse(spec)
    what = f"{flag.strip('-')} file"
    if name != "hub" and not os.path.exists(path):
        raise DataError(f"there is no {what} or directory {path}. Check {flag} {spec}.")
    found = DATA_SETS[name].read(path, chosen if labelled else {**chosen, "label": ("0",)})
    if "as" in chosen:
        found = _drawn(found, chosen["as"], path, report)
    prompts = [replace(prompt, source=name, kind=prompt.kind or f"{name}/{prompt.attack}") for prompt in found]
    if not prompts:
        raise DataError(f"{path} has no prompts, or none that the options leave. Check {flag} {spec}.")
    for prompt_name, count in Counter(prompt.name for prompt in prompts).items():
        if count > 1:
            raise DataError(f"{path} has the id {prompt_name!r} twice. Give each record its own.")
    for prompt in {prompt.picture: prompt for prompt in reversed(prompts) if prompt.picture is not None}.values():
        prompt.conversation()  # fail now if a picture is broken, not after an hour of model runs
    return prompts


def parse(spec: str) -> tuple[str, Path, Chosen]:
    """Return the data set's name, the path, and the chosen values of all its options.

    Raises DataError for an unknown data set, option or value, or without a path.
    """
    match = SPEC.fullmatch(spec)
    assert match is not None  # the pattern matches any text
    # An existing file may have colons and commas in its name.
    name, path, given = ("", spec, "") if os.path.exists(spec) else match.groups(default="")
    name = name or ("table" if path.lower().endswith(TABLES) else "jsonl")
    if name not in DATA_SETS:
        raise DataError(f"{spec}: there is no data set {name!r}. Known are {', '.join(DATA_SETS)}.")
    if not path.strip():
        raise DataError(f"{spec!r} names no path. Write name:PATH, for example xstest:xstest_prompts.csv.")
    options = DATA_SETS[name].options
    said = {option: default for option, (_, default) in options.items()}
    for item in given.split(",")[1:]:
        option, _, value = item.partition("=")
        if option not in options:
            raise DataError(f"{spec}: {name} has no option {option!r}; it has {', '.join(options) or 'none'}.")
        said[option] = value
    chosen = {}
    for option, (values, _) in options.items():
        words, known = [folded(word) for word in said[option].split("+")], values.split()
        unknown = [word for word in words if word not in ("all", *map(folded, known))]
        if known and unknown:
            raise DataError(f"{spec}: {option} {unknown[0]!r} must be one of {', '.join(known)}.")
        picked = tuple(value for value in known if "all" in words or folded(value) in words)
        chosen[option] = picked if known else (said[option],)
    return name, Path(os.path.expanduser(path)), chosen


def _drawn(prompts: Iterable[Prompt], ways: Sequence[str], path: Path, report: Silent) -> Iterator[Prompt]:
    """Yield each prompt as text, as a drawn picture, or both. Texts too long for a picture are not drawn."""
    left_out = 0
    for prompt in prompts:
        if "text" in ways:
            yield prompt
        if "picture" in ways and fits(prompt.prompt):
            yield replace(under_a_carrier(prompt, crc32(prompt.prompt.encode())), attack="typographic")
        left_out += "picture" in ways and not fits(prompt.prompt)
    if left_out:
        report.warn(f"{path}: {left_out} texts do not fit the {GRID * GRID} cells of a picture and are left out.")


def load_all(specs: Sequence[str], flag: str = "--data", report: Silent = QUIET) -> list[Prompt]:
    """Return the prompts of several data sets, in order, grouped across all of them (see `grouped`).

    With several sets, each prompt's name begins with its data set's name and number, which keeps names unique.
    """
    if len(set(specs)) < len(specs):
        raise DataError(f"a {flag} is given twice, so that its prompts would count double: {', '.join(specs)}.")
    found: list[Prompt] = []
    for place, spec in enumerate(specs, 1):
        for prompt in load(spec, flag, report):
            label = f"{prompt.source}#{place}"
            name = f"{label}/{prompt.name}" if len(specs) > 1 else prompt.name
            # Equal group names in two data sets are unrelated.
            found.append(replace(prompt, name=name, group=f"{label}/{prompt.group}"))
    return grouped(found)


def calibration_prompts(specs: Sequence[str], report: Silent = QUIET) -> list[Prompt]:
    """Return the prompts of all specs, by default the built-in set. Raises DataError for under `LEAST` of a label.

    A lone built-in set or JSONL file keeps its own groups. Otherwise, prompts that share a picture or a question form
    one group.
    """
    specs = specs or (BUILTIN,)
    alone = len(specs) == 1 and (specs[0] == BUILTIN or parse(specs[0])[0] == "jsonl")
    prompts = load(specs[0], CALIBRATION) if alone else load_all(specs, CALIBRATION, report)
    check_labels(prompts, LEAST, CALIBRATION, f"{' and '.join(specs)}: a probe")
    return prompts


def check_labels(prompts: Sequence[Prompt], least: int, flag: str, what: str) -> None:
    """Raise DataError if either label has fewer than `least` prompts. `what` names the step that needs them."""
    for label, example in EXAMPLES.items():
        if sum(prompt.label == label for prompt in prompts) < least:
            raise DataError(
                f"{what} needs both kinds of prompts, and fewer than {least} are "
                f"{('harmless', 'harmful')[label]} (label {label}). Add some with another {flag}, for example "
                f"{flag} {example}."
            )


def lopsided(prompts: Sequence[Prompt]) -> str | None:
    """Return a warning if the presence of a picture predicts the label, because the probe might learn only that."""
    seen = {(prompt.channel, prompt.label) for prompt in prompts}
    for pictured, other, label in (("harmful", "harmless", 1), ("harmless", "harmful", 0)):
        if seen == {("picture", label), ("text", 1 - label)}:
            return (
                f"All prompts with a picture are {pictured} and all without one are {other}, so the probe may learn "
                f"to see whether there is a picture instead of what is asked. Add {other} prompts with pictures, for "
                "example from VLGuard."
            )
    return None
