"""Pure tensor math: tensors in, tensors out. No files, no ranks, no logging."""
