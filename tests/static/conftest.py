"""What the static path warns of."""

import pytest

from hf_treeflash.static import decoding, launch


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """The warnings of the static path, repeated ones too."""
    told: list[str] = []
    for module in (decoding, launch):
        monkeypatch.setattr(module.logger, "warning_once", told.append)
    return told
