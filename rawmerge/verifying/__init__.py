"""Whether an output is what base and adapter give: replayed, and compared bit for bit."""
