"""The store's versions, for Alembic: each file in `versions` is one step."""
