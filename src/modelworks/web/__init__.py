"""The pages: chat, runs and models, and `up`, which starts everything together.

Thin: they show what the rooms above compute. NiceGUI is imported by the modules that draw.
"""
