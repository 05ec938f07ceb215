"""lco-lite: reinforcement learning for small language models by logits-convex optimisation.

Paper: *Stabilizing Policy Optimization via Logits Convexity*, arXiv 2603.00963 ("the paper" throughout).
"""

__version__ = "0.5.0"
