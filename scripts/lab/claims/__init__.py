"""The claims of "Attention Is All You Need", put to the test.

Each claim is a function that measures, judges and returns a `claim.Claim`; its verdict follows
from its checks alone. `page` writes them to a page of results.
"""
