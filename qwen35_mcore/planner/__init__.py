"""Where memory and time go, and which parallel layout to use; standard library only."""
