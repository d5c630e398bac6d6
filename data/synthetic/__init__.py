"""Synthetic grade-school problems: graphs, wording, step-by-step checks, and changed plans."""
