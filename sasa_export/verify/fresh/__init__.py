"""A separate program (`python fresh/`) that runs a written directory. It uses no code of sasa_export."""
