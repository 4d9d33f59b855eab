"""The claims of "Attention Is All You Need", put to the test.

Each claim is a function that measures, draws a figure and returns a `claim.Claim`.
"""
