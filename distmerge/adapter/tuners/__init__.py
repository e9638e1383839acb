"""What each kind of adapter does to a parameter: LoRA in all its variants, experts, token rows, other tuners."""
