"""The room of `verify`: a published output held against its receipt, and against float64 arithmetic of its inputs."""
