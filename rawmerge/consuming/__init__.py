"""Merges whose base gives way to the output, and that go on where they were cut off."""
