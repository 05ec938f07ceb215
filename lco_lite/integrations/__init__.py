"""How does the loss run in other trainers?"""
