"""Jobs that survive: the store, who runs what is in it, batches, webhooks. Imported only where a store is asked for."""
