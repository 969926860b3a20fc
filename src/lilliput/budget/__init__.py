"""The best choice among options that cost bytes and loss, under a budget of bytes."""
