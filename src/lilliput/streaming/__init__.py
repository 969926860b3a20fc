"""The walk over blocks: forward and backward passes that keep one block in memory, and their states on disk."""
