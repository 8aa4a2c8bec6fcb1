"""The fast side: each file is the twin of its namesake in ref_numpy, in PyTorch."""
