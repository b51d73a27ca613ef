"""What differs from one kind of model to another."""
