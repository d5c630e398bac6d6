"""GSM8K: problems with rule-based plans, answers as read by lm-evaluation-harness, near-duplicates."""
