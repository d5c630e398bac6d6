"""Evaluation: answers to problems, likelihoods, plan dependence and text quality."""
