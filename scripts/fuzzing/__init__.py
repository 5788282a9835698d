"""What `scripts/fuzz.py` needs: targets, their first inputs, how inputs are changed, and what no input may do."""
