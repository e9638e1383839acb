"""What training saved: PEFT's configuration and keys, resolved to the base tensors that they change."""
