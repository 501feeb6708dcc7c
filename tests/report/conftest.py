"""The tests of reports look at pictures as users have them."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _rendered(rendered_pictures: None) -> None:
    """Render the pictures of every module here."""
