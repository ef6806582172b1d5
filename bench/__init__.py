"""Measure speed, memory and accuracy of TDPO, against everyone, beside the matrix products that it cannot do without.

``python -m bench`` measures, ``python -m bench report`` makes tables and figures of what was measured last. To read:

====================  ==================================================================================
`shapes`, `problem`   what is measured: sizes of real models, and the inputs everybody is given
`providers/`          against whom; who cannot run says why
`gate`                nothing is timed before it was held against the truth
`run`                 one shape: gate, memory, time; with `measure` and `memory`
`drift`, `step`       accuracy as the policy drifts away; whole training steps, and the longest context that fits
`rows`, `conditions`  what is kept in `results/`, and under what conditions it was measured
`report/`             rows as tables and figures; `scaling` is estimated
`gpu/`                the campaign on a GPU
`reproduce/`          the paper's experiment in miniature
====================  ==================================================================================
"""
