"""Losses and their gradients from final hidden states.

Legend of these modules: T tokens, C of them in a chunk, V vocabulary, d hidden width of the policy, d_r of the reward
model or teacher φ; h final hidden states, W the policy's head, z logits, π_θ the policy now and π_old when it acted; A
advantage, β temperature, z* the target's logits and r = z* − z_θ the residual.
"""
