"""Speed, memory and accuracy of TDPO, against everyone, beside the matrix products that it cannot do without.

``python -m bench`` measures, ``python -m bench report`` makes tables, figures and a page of what was measured last, and
``pytest bench/ --benchmark-only`` times one step for comparison across commits. To read:

====================  ==================================================================================
`shapes`, `problem`   what is measured: sizes of real models, and the inputs everybody is given
`providers/`          against whom, a file each; who cannot run says why
`gate`                nothing wrong is timed
`run`                 one shape: gate, memory, time; with `measure`, `memory`, `energy`, `roofline`
`drift`               accuracy as the policy drifts away from the reference
`step`                whole training steps, and the longest context that fits
`rows`, `conditions`  what is kept in `results/`, and under what conditions it was measured
`report/`             rows as tables, figures and a page
`gpu/`                the campaign on a GPU
`reproduce/`          the paper's experiment in miniature
====================  ==================================================================================
"""
