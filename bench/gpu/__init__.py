"""The campaign on a GPU: everything that only a GPU can tell, as one command that goes on where it was interrupted.

``python -m bench.gpu --out DIR`` (`make gpu`) needs neither network nor environment, only a python with torch and
Triton. `driver.py` keeps the time and the records, `worker.py` does the work in a process that may die, `stages/` is
the work, `summary.py` says what came out, `collect.py` takes it into the checkout.
"""
