"""From a path to batches: sources, columns and labels, subsets, cache and stream, tensors. It knows no model."""
