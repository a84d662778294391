"""Find where a model perceives danger, where it understands, and where it begins to speak; propose its layers.

The way through it: `locate` in run.py; the proposal's rules in propose.py; the three capabilities in perception.py,
understanding.py and expression.py.
"""
