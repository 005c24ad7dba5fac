"""Boxes: a detector upon an encoder, the measure of detections, pictures of them."""
