"""The toy world of the bundled models, and their training."""
