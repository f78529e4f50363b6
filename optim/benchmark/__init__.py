"""How fast this machine is: `python -m optim.benchmark`."""
