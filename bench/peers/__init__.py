"""Ways to run one MoE layer, beside which expar's is measured: one module each."""
