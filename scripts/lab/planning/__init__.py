"""AOT compilation of a config for a topology: memory, communication and a roofline estimate."""
