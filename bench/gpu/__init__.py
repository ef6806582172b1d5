"""Measure on a GPU everything that only a GPU can tell, as one command that goes on where it was cut off.

``python -m bench.gpu --out DIR`` (`make gpu`) needs neither network nor environment, only a python with torch and
Triton. `campaign` keeps time and notes, `stages`, `kernels` and `tune` do the work, `summary` says what came out.
"""
