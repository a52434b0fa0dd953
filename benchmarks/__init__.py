"""Benchmarks of pygan against PyTorch as people write it and as experts tune it.

``pytest benchmarks --benchmark-only`` measures; ``python -m benchmarks.report`` makes the tables.
``python -m benchmarks.gpu_suite --out DIR`` does all that an NVIDIA GPU is needed for, and
``python -m benchmarks.step_model`` says how long a step must take there.
The protocol:

- All sides of a case are timed in turn, A B C A B C, in one process after a warm-up, and a ratio
  is taken within each round: a clock that drifts slows every side of a round alike.
- Before that, every side must compute the right thing (`benchmarks.correct`). A side that does
  not makes its whole case fail, and the case prints no number.
  A method of which it is known, and which pygan does not take by itself, is skipped instead, with
  its error as the reason.
- Peak memory is taken in a process for each side.
- FLOPs and bytes are those of the minimal algorithm (`benchmarks.work`), whatever a side really
  does, so that GFLOP/s of two sides compare.
"""
