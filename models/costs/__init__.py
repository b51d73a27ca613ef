"""What a request costs, in multiply-accumulates."""
