"""A general mutation tool over the reference: every operator, number, condition and loop is changed once.

    python -m parity_tests.mutants

The bugs of the zoo are those that people make; these are those that nobody thought of. A mutant has to be
killed by the component's own test, or stand in equivalent.toml with the reason why it is no bug.
"""
