"""The bypass matrix: one row a way of running a guarded model, on torch and on onnxruntime.

A row runs harmful and harmless prompts in its way, beside the original model in that same way, and holds where the
harmful are refused and the harmless get the original's tokens, or where it ends in a loud error. docs/security.md says
whom the gate is meant to stop; `tools/write_tables.py` makes docs/results/bypass-matrix.md out of a test run.
"""
