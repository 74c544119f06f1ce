"""Replicas, their engines and the router, as plain classes; Ray wraps them in `cluster`."""
