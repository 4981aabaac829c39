"""The model's side: what it is, how it is called, what it says."""
