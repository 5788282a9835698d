"""How much memory a merge may take, and what it is predicted to take."""
