"""Measuring and showing: ways to decode compared, and a demo; import its modules."""
