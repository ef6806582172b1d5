"""Speed, memory and correctness of a TDPO step, measured beside the four matrix products it cannot do without.

``python -m bench`` measures, ``python -m bench report`` prints what was measured last as Markdown. Read `shapes.py` for
what is measured, `providers/` for against what, and `gate.py`, `memory.py` and `measure.py` for how.
"""
