"""The claims of "Attention Is All You Need", as a short text tells them, put to the test.

Each claim is a function that measures and gives a `page.Claim`; its verdict follows from its
checks by `Claim.verdict`, and from nothing else.
"""
