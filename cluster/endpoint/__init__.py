"""The HTTP side of the endpoint, without Ray: everything here runs and is tested in one process."""
