"""Times rawmerge against `cp` and against PEFT on synthetic checkpoints; `README.md` says how to run it."""
