"""Measurements behind the figures of the README, printed as tables: ``make bench`` or ``python -m tests.benchmarks``.

Only ratios taken inside one interleaved run count: every method is stepped in turn, with the same weights and the same
batches where that is possible, and timed by the CPU time of this process. Absolute times are indicative.
"""
