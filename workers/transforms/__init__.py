"""What happens to a picture before the model sees it."""
