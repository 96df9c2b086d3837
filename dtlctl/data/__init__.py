"""From a path to batches: sources, columns and labels, subsets, the decoded cache, tensors. It knows no model."""
