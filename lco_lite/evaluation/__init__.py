"""How good is a policy? Which items it answers right, how sure that is, and whether another one is better."""
