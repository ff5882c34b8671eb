"""The demo world (`make demo`): real faults in a real shop, found and healed by the real agent.

Nothing of the service imports this package. The agent under demonstration is the installed command, run as a
subprocess.
"""
