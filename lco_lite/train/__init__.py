"""How does a model get better?"""
