"""One step of the store a file."""
