"""Disposable transfer learning on the command line: pre-train, fine-tune, dispose, and prove it with attacks."""

__version__ = "0.1.0"
