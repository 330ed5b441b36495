"""Models, data, training loop and attacks that the deep experiments share."""
