"""The stored form of blocks: objects that hold runs of blocks, found without an index server."""
