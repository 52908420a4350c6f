"""How a run looks while it goes on: on a terminal, in a notebook, in a log; the same for commands and programs."""
