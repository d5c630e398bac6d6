"""Model and tasks for lm-evaluation-harness."""
