"""The one training loop and what it needs to stop, go on and be trusted. It knows settings and tensors, no run."""
