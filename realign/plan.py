"""x"""
def make(config): pass
