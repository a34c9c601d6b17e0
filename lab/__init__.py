"""
The workshop: files, formats and runs. It knows nothing of language models or RL.

The modules in this folder import each other and nothing from outside it; a test checks that.
"""
