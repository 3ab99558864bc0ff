"""Bare mathematics on tensors: what several families of transforms compute with.

What is here imports only `contract/`, for the precision that it computes in. Families of
`transforms/` import it, and the rooms above may.
"""
