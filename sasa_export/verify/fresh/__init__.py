"""A program of its own (`python -I fresh/`), which knows nothing of sasa_export: it runs what was written."""
