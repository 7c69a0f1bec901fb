"""Synthetic tasks: questions of any length whose answers are known, made from a tokenizer, a haystack and a seed.

Every task is a function of a `Request`; `tasks.registry` names them. Answers are hidden in real text from a random
place of a random book on, at a depth that is measured in tokens, and a prompt with its answer fills its length and
never passes it.
"""
