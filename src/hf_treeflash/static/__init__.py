"""
`cache_implementation="static"`: the whole round (draft, verify, walk, commit) on the device, with static shapes.

`generate()` loads this package with the first call that asks for it.
"""

from .decoding import StaticDecoding

__all__ = ["StaticDecoding"]
