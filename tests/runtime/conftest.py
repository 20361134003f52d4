"""The operator library, built once for a test session."""

from pathlib import Path

import pytest

from srigl_fx.runtime.ort.library import library_path, library_status


@pytest.fixture(scope="session")
def library() -> Path:
    """The built operator library; tests that need it are skipped on other platforms than Linux x86-64."""
    status = library_status()
    if not status.supported:
        pytest.skip(status.reason)
    return library_path()
