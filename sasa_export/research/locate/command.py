"""`sasa-export locate`."""

from __future__ import annotations

from typing import Any

import click

from sasa_export.flags import flags
from sasa_export.report import Console, quiet
from sasa_export.research.locate.options import LocateOptions


@click.command("locate")
@flags(LocateOptions)
def locate_command(**values: Any) -> None:
    """Find where a model perceives danger, understands and speaks, and propose its layers.

    Writes report.html, which opens without a network, with its pictures, report.md and locate.json. An interrupted run
    goes on where it stopped when the same command is given again; accelerate launch spreads it over processes.
    """
    quiet()
    from sasa_export.research.locate.run import locate

    locate(LocateOptions(**values), Console())
