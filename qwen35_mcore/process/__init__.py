"""What a process does at its edges: quiet imports, Ctrl-C in one line, locks, writes that last.

Imports the standard library and `errors` only.
"""
