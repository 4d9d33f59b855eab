"""The claims of "Attention Is All You Need", put to the test: a function for each."""
