"""Backward passes: one fold (:mod:`ocnopt.differential.sweep`) and the steps that go into it."""
