"""What a process does at its edges: quiet imports, Ctrl-C in one line, locks on files.

Imports the standard library only.
"""
