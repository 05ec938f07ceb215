"""Where do responses come from?"""
