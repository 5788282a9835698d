"""Which adapter tensor goes to which base tensor: names, experts, heads, vocabularies, ties. No tensor is computed."""
