"""Evaluation: answers to problems, likelihoods, dependence on plans, quality of texts."""
