"""The field's decoders."""
