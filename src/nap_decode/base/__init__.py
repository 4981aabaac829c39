"""What everything stands on: errors, random numbers, batches of tensors."""
