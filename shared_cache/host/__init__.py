"""The host tier: verified blocks in this node's memory."""
