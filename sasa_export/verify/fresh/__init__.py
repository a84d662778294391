"""A program of its own (`python fresh/`), which knows nothing of sasa_export: it runs what was written."""
