"""The engine: one thread that owns the device, and all that it works with."""
