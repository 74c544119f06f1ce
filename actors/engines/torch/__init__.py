"""The embedded engine: a transformers decoder over a paged pool, on any machine."""
