"""Which parallel layout to use, and where memory and time go: `qwen35 plan`.

`search` tries layouts, `memory` and `cost` predict each from `hardware` and `calibration`;
`report`, `explain`, `picture` and `emit` show and write what was found. Imports the standard
library, `errors`, `config` and `parallel`; rich and matplotlib only to print and draw.
"""
