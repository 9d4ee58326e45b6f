"""A look at a generation, round by round: a recorder, a page to read it on, and a picture of one round."""

from .page import render_page, write_trace
from .picture import round_picture
from .recorder import Trace, trace

__all__ = ["Trace", "render_page", "round_picture", "trace", "write_trace"]
