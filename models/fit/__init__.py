"""A training loop that can be stopped and resumed, and its optimizer."""
