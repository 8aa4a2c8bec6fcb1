"""The proof: random cases, both sides, values and gradients."""
