"""The model and the tasks of this package in lm-evaluation-harness."""
