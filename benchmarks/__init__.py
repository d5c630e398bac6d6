"""Benchmarks: they need a clone of the repository, whose recipes they read and beside which they write results."""
