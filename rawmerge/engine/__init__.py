"""What moves bytes: jobs of threads, tiles, and the output file that they write."""
