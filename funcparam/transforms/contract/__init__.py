"""What every transform promises, and how its tensors, arguments and precision are checked.

What is here imports nothing of funcparam. Every family of `transforms/` and every room above may
import it; users find its names in `funcparam.transforms`.
"""
