"""longlora: longer context for open language models, and the proof that it worked."""

__version__ = "0.1.0"
