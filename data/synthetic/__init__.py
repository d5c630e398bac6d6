"""Synthetic grade-school problems: drawn, put into words, checked step by step, with their plans changed."""
