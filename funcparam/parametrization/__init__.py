"""The dictionary level: rules picked by name, checked at one boundary, evaluated in stacks.

What is here imports `transforms/` and nothing above it: it knows no named transform, no module
form and no file. Every room above may import it; users find its names in `funcparam`.
"""
