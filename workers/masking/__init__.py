"""Which patches are hidden. Functions from sizes and a ratio (or a map) to index tensors."""
