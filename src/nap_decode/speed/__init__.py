"""What makes decoding faster: reuse of keys and values, captured steps, compiled kernels."""
