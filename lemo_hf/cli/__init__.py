"""The command `lemo`: one file a command.

A command imports what it needs when it runs, so that ``lemo --help`` answers at once.
"""
