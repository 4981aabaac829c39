"""What a decoder is made of."""
