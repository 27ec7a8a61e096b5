"""The command `lemo`: one file a command.

What a command needs is imported when it runs, so that ``lemo --help`` answers at once.
"""
