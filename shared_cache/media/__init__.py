"""Where objects lie: local disks, object stores, and whatever else fsspec knows."""
