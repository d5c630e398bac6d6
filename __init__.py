"""Hierarchical block diffusion language models (Hier-BD3-LM) for Hugging Face Transformers."""

__version__ = "0.1.0"
