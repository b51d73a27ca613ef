"""Low-rank adapters as tensors that travel with the rows."""
