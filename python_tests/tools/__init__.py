"""Scripts that write the fixtures of the suite, and read them."""
