"""MM-SafetyBench (Liu et al., ECCV 2024): 13 scenarios, each question asked by three kinds of picture.

    data/processed_questions/{scenario}.json    {id: {"Question", "Rephrased Question", "Rephrased Question(SD)", ...}}
    data/imgs/{scenario}/{SD|SD_TYPO|TYPO}/{id}.jpg

All of its records are harmful by its authors' policy, the requests for advice of scenarios 8 and 10 to 13 too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sasa_export.errors import DataError
from sasa_export.prompts.picture import Pictures
from sasa_export.prompts.read import find, json_of, text_in
from sasa_export.prompts.record import Record, record
from sasa_export.prompts.spec import Chosen, Loader, Option

NAME = "mm-safetybench"
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


def read(directory: Path, chosen: Chosen) -> list[Record]:
    """One record a question and variant. `directory` holds data/, or is it."""
    root = directory / "data" if (directory / "data").is_dir() else directory
    questions, pictures = root / "processed_questions", Pictures(root / "imgs")
    for path in sorted(questions.glob("*.json")):
        if path.stem not in SCENARIOS:
            raise DataError(f"{path} is of an unknown scenario; the data set has {', '.join(SCENARIOS)}.")
    found = []
    for scenario in chosen["scenario"]:
        hint = "Give the directory that has data/, and name the scenarios if they are not all there: scenario=01+02."
        path = find([questions / f"{scenario}.json"], hint)
        entries = json_of(path)
        if not isinstance(entries, dict):
            raise DataError(f"{path} is no JSON object of questions by their ids.")
        if not entries:
            raise DataError(f"{path} has no questions.")
        for number, fields in entries.items():
            for variant in chosen["variant"]:
                found.append(_record(scenario, number, fields, variant, pictures, f"{path}, record {number!r}"))
    return found


def _record(scenario: str, number: str, fields: Any, variant: str, pictures: Pictures, where: str) -> Record:
    if not isinstance(fields, dict):
        raise DataError(f"{where} is no JSON object.")
    question = text_in(fields, "Question", where)
    prompt = text_in(fields, PROMPTS[variant], where)
    picture = None if variant == "text" else pictures.find(f"{scenario}/{variant}/{number}.jpg", where)
    return record(
        source=NAME,
        name=f"{scenario}/{number}/{variant}",
        prompt=prompt,
        label=1,
        group=f"{scenario}/{number}",
        category=scenario,
        attack=variant,
        question=question,
        picture=picture,
        where=where,
    )


LOADER = Loader(
    NAME,
    read,
    {
        "variant": Option(tuple(PROMPTS), ("SD_TYPO",)),
        "scenario": Option(
            SCENARIOS,
            SCENARIOS,
            {key: (name,) for name in SCENARIOS for key in (name[:2], name[:2].lstrip("0"), name[3:])},
        ),
    },
)
