"""The Ray side: actors out of plain classes, the cluster they form, its endpoint and commands."""
