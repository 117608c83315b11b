"""Modelworks: a run spec in, a large language model and a chat assistant out.

The rooms, in the order in which goods flow: ``spec``, ``plan``, ``simulate``, ``model``, ``data``, ``train``,
``launch``, ``release``, ``serve``, ``assistant``, ``web``; ``cli`` holds the commands. Importing this package
imports none of them.
"""

__version__ = "0.1.0"
