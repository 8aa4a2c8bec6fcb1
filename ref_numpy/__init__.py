"""The reference: a transformer language model in plain NumPy, forward and backward derived by hand.

Read in this order: linear, activations, layernorm, attention, ffn, block, transformer, loss, optim, train.
"""
