"""Where memory and time go, and which parallel layout to use: `qwen35 plan` (see README.md here).

Imports the standard library, `errors`, `config` and `parallel` only; the tables need rich and the
picture needs matplotlib, both imported where something is printed or drawn.
"""
