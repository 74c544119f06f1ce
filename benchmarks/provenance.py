"""What a figure was measured on: without it nobody can make it again or compare it."""

import os
import subprocess
from datetime import datetime, timezone
from typing import Any

from cluster.demo.report import hardware, versions


def provenance() -> dict[str, Any]:
    """Date, commit, machine and versions. `KVCOMMONS_COMMIT` names the commit of a bare copy."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": os.environ.get("KVCOMMONS_COMMIT") or _commit(),
        "hardware": hardware(),
        "versions": versions(),
    }


def _commit() -> str | None:
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return described.stdout.strip() or None
