"""Values into a module: for one call, for the life of a shell, or for good.

What is here imports `parametrization/` and `transforms/`, and of `checkpoint/` only what reads
a file into a shell. `compat/` may import it; users find its names in `funcparam`.
"""
