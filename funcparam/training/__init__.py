"""From raw to an optimizer.

What is here imports `parametrization/` and `transforms/`. No other room imports it; users find
its names in `funcparam`.
"""
