"""Where a base and an adapter lie, and whether they are what they were."""
