"""What a model is measured by: answers to problems, likelihoods, plans and texts."""
