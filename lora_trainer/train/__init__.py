"""Train an adapter: tokens, steps, memory plan and the backends, which alone import torch."""
