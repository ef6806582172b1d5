"""One module a stage: `items` says what there is to do, `finish` what follows from all of it."""
