"""What a row may take from memory in place of computing it: sites, step plans, liveness, and the store behind them."""
