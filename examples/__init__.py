"""Scripts, notebooks and a study that show what the library is for."""
