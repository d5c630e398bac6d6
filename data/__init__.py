"""Datasets, tokenization and batches; knows the layout of a sequence and no model."""
