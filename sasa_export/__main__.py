"""`python -m sasa_export`."""

from sasa_export.cli import main

main()
