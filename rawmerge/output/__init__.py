"""The directory that is made: its files beside the tensors, and shards that need not be made."""
