"""What the author of a method sees: the types of its arguments and of what it returns."""
