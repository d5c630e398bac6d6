"""Benchmarks. They need a clone of the repository: they read its recipes and write into its folders."""
