"""Train an adapter: tokenization, steps, memory plan, and the backends, which are the only modules that import torch."""
