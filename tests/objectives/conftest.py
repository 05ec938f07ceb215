"""Property tests draw the same examples every time, and a slow machine does not fail them."""

from hypothesis import settings

settings.register_profile("objectives", deadline=None, derandomize=True, database=None)
settings.load_profile("objectives")
