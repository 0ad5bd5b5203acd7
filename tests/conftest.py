"""Fixtures that tests of several modules ask for by name."""

import pytest


@pytest.fixture(scope="module")
def small_pictures():
    """Draw no previews: that is most of the time of small slides."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "wsi_pipeline.results.draw_preview", lambda picture, *_, **__: picture[::4, ::4]
        )
        yield
