"""From the names in an adapter to the tensors in a checkpoint, in every generation of names."""
