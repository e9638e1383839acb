"""What a base holds: safetensors headers, the index, stored formats, side files. Reads headers, never tensor data."""
