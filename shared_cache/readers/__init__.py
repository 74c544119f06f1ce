"""A process that copies and verifies blocks beside its replica, for whom it has the cores."""
