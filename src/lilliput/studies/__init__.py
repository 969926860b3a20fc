"""What several models or runs show together, and the list of everything that is measured."""
