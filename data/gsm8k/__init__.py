"""GSM8K: its problems with plans by rule, answers as lm-evaluation-harness reads them, near-duplicates."""
