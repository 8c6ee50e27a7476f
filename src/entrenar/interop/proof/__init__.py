"""Independent readers that verify each file that is written: they share no code with the writers they check."""
