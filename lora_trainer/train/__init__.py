"""Train an adapter: tokens, steps, memory plan, and the backends, the only modules that import torch."""
