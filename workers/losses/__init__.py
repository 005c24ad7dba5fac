"""What is minimised. Functions from tensors to scalars."""
