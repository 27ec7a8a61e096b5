"""LeMo in other training stacks; each file needs only the stack it is named after."""
