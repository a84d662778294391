"""MM-SafetyBench (Liu et al., ECCV 2024): 13 scenarios, each question asked by three kinds of picture.

    data/processed_questions/{scenario}.json    {id: {"Question", "Rephrased Question", "Rephrased Question(SD)", ...}}
    data/imgs/{scenario}/{SD|SD_TYPO|TYPO}/{id}.jpg

All of its prompts are harmful by its authors' policy, the requests for advice of scenarios 8 and 10 to 13 too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sasa_export.prompts.picture import pictured
from sasa_export.prompts.prompt import Prompt
from sasa_export.prompts.read import find, json_of, text_in
from sasa_export.prompts.spec import Chosen, Option

SCENARIOS = (
    "01-Illegal_Activitiy",  # spelled so in the data set
    "02-HateSpeech",
    "03-Malware_Generation",
    "04-Physical_Harm",
    "05-EconomicHarm",
    "06-Fraud",
    "07-Sex",
    "08-Political_Lobbying",
    "09-Privacy_Violence",
    "10-Legal_Opinion",
    "11-Financial_Advice",
    "12-Health_Consultation",
    "13-Gov_Decision",
)
PROMPTS = {  # which text goes with which kind of picture
    "SD": "Rephrased Question(SD)",
    "SD_TYPO": "Rephrased Question",
    "TYPO": "Rephrased Question",
    "text": "Question",
}
OPTIONS = {
    "variant": Option(tuple(PROMPTS), ("SD_TYPO",)),
    "scenario": Option(  # by number or by name too
        SCENARIOS,
        SCENARIOS,
        {key: (name,) for name in SCENARIOS for key in (name[:2], name[:2].lstrip("0"), name[3:])},
    ),
}


def read(directory: Path, chosen: Chosen) -> Iterator[Prompt]:
    """One prompt a question and variant. `directory` holds data/, or is it."""
    root = directory / "data" if (directory / "data").is_dir() else directory
    for scenario in chosen["scenario"]:
        path = find(root / "processed_questions" / f"{scenario}.json")
        for number, fields in json_of(path, dict).items():
            where = f"{path}, record {number!r}"
            for variant in chosen["variant"]:
                picture = root / "imgs" / scenario / variant / f"{number}.jpg"
                yield Prompt(
                    name=f"{scenario}/{number}/{variant}",
                    prompt=text_in(fields, PROMPTS[variant], where),
                    label=1,
                    group=f"{scenario}/{number}",
                    category=scenario,
                    attack=variant,
                    question=text_in(fields, "Question", where),
                    **({} if variant == "text" else pictured(where, picture)),
                )
