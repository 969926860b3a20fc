"""What a recipe will do on a model: every tensor, every byte, all of it before weights are read."""
