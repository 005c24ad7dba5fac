"""From tokens and attention maps to a vector or to numbers. Functions and small modules, tensors in, tensors out."""
