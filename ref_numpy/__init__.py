"""The reference: a transformer language model in plain NumPy, forward and backward derived by hand.

Read in this order: linear, activations, layernorm, rng, dropout, embedding, positions, masks, attention,
multi_head_attention, ffn, config, parameters, block, transformer, loss, optim, data, train, kv_cache,
sampling, generate; then the variants: rope, alibi, cross_attention, cross_block, seq2seq. In all of them dx
stands for the gradient of the loss with respect to x, an array of x's shape; backward is given dy and the
forward's cache, and makes dx of them.
"""
