"""What came out, and what happened when."""
