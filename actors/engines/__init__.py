"""Engines that a replica can own."""
