"""Mutation testing: faults planted one at a time in a copy of the tree, and the tests of the same room run on each.

`make mutants` runs `python -m mutation`. cosmic-ray plants the faults and keeps the results; here they are drawn by
seed, and tried fast: a process that has imported torch forks for each fault, and runs only the tests that execute the
changed line, those that caught others in the same file first.
"""
