"""Meters: AR-ness, likelihood, parallelism, and pictures of them."""
