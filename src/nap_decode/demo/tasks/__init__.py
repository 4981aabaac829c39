"""Task files of lm-evaluation-harness for the embedded model."""
