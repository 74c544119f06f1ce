"""Tokens between processes: a replica's stream on a socket of its own."""
