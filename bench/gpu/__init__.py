"""Measure on a GPU everything that only a GPU can tell, as one command that goes on where it was cut off.

``python -m bench.gpu --out DIR`` (`make gpu`) needs neither network nor environment, only a python with torch and
Triton. `campaign` keeps time and notes, `stages`, `kernels` and `tune` do the work, `summary` says what came out.

Memory errors and races of kernels are compute-sanitizer's to find, where it works: give it ``python -m tdpo_kernels
verify "one token"``, with PYTORCH_NO_CUDA_MEMORY_CACHING=1, for a pool would hide them, and TDPO_KERNELS_SELF_CHECK=0.
"""
