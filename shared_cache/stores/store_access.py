"""What may be done with a store is tried when it is opened, not when the first block is saved."""

from shared_cache.errors import ConfigError, StoreReadOnlyError
from shared_cache.media.medium import Medium
from shared_cache.namespace import Namespace


def try_to_write(medium: Medium, namespace: Namespace) -> None:
    """Leave a description of the namespace beside its objects; raises where that is impossible."""
    try:
        medium.prepare()
        medium.publish("namespace.json", [memoryview(namespace.to_json().encode() + b"\n")])
    except (NotADirectoryError, FileExistsError) as error:
        raise ConfigError(f"the store needs a folder, but a file is in its way: {error}") from error


def check_readable(medium: Medium, root: str, url: str, error: StoreReadOnlyError) -> None:
    """Raise unless a store that refused a write with `error` may be read."""
    try:
        medium.check_readable(root)
    except FileNotFoundError:
        raise StoreReadOnlyError(
            f"{url} does not exist and may not be created: create it, or choose another store"
        ) from error
