"""What made a deployed loop another model: known faults, each tried on the numbers.

A fault is not guessed from the shape of a curve. It is planted on the healthy side, and named where
what then comes out is what the deployed side gave.
"""
